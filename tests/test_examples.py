"""Every example runs, says what it gained, and stays under 100 lines."""

from pathlib import Path

import forked
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
PICTURES = {"convert_normflows": "normflows.pt"}  # what it leaves, where that is not a picture of its name


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_example(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 100
    monkeypatch.chdir(tmp_path)
    done = forked.ended(forked.script, path, "--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "gained: " in done.stdout
    left = tmp_path / PICTURES.get(path.stem, f"{path.stem}.png")
    assert left.stat().st_size > 5000
    assert set(tmp_path.iterdir()) <= {left, tmp_path / "sbi-logs"}
