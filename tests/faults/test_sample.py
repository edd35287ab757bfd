"""A minute of `make faults`, which takes half an hour: a few faults of every kind, each kind in a process of its own.

The whole campaign is a command and no test, because it is run before a release and not with every change.
"""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Faults of each campaign: about ten seconds each.
COUNTS = {"kills": 12, "signals": 8, "disk": 8, "writers": 20, "damage": 100, "sources": 30, "command_lines": 30}


@pytest.mark.skipif(sys.platform != "linux", reason="faults are injected with LD_PRELOAD")
@pytest.mark.parametrize("name", COUNTS)
def test_nothing_is_lost_and_nothing_silently_wrong(name: str) -> None:
    options = ["--only", name, "--shares", "1", "--count", str(COUNTS[name]), "--processes", "1"]
    command = [sys.executable, HERE, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
