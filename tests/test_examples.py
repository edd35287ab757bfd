"""Every example runs, says what it gained, and stays under 100 lines."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
PICTURES = {"convert_normflows": "normflows.pt"}  # what it leaves, where that is not a picture of its name


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_example(path: Path, tmp_path: Path) -> None:
    assert len(path.read_text().splitlines()) < 100
    done = subprocess.run(
        [sys.executable, "-W", "error", path, "--quick", "--out", tmp_path],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "gained: " in done.stdout
    left = tmp_path / PICTURES.get(path.stem, f"{path.stem}.png")
    assert left.stat().st_size > 5000
    assert set(tmp_path.iterdir()) <= {left, tmp_path / "sbi-logs"}
