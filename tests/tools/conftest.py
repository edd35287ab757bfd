"""The scripts in tools/ import one another by their plain names, as Python has it for scripts of one folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
