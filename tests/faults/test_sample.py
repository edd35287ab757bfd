"""A minute of `make faults`, which takes half an hour: a few faults of every campaign, in two processes.

The whole campaign is a command and no test, because it is run before a release and not with every change.
"""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Campaigns that share a process, and the number of faults of each: about half a minute.
SAMPLES = {"kills,signals,disk,writers": 8, "readers,damage,sources,command_lines": 25}


@pytest.mark.skipif(sys.platform != "linux", reason="faults are injected with LD_PRELOAD")
@pytest.mark.parametrize("names", SAMPLES)
def test_nothing_is_lost_and_nothing_silently_wrong(names: str) -> None:
    options = ["--only", names, "--shares", "1", "--count", str(SAMPLES[names]), "--processes", "1"]
    done = subprocess.run([sys.executable, HERE, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
