"""Half a minute of `make faults`, which takes half an hour: a few faults of every campaign, in one process.

The whole campaign is a command and no test, because it is run before a release and not with every change.
"""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(sys.platform != "linux", reason="faults are injected with LD_PRELOAD")
@pytest.mark.parametrize("count", [8, pytest.param(25, marks=pytest.mark.long)])
def test_nothing_is_lost_and_nothing_silently_wrong(count: int) -> None:
    """`count` faults of each campaign. Eight reach every writer, signal and number of an error, and a disk that is full."""
    options = ["--shares", "1", "--count", str(count), "--processes", "1"]
    done = subprocess.run([sys.executable, HERE, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
