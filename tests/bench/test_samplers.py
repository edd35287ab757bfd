"""The study of samplers: it measures what it says, and its table says what the rows say."""

import sys
from pathlib import Path

import pytest

from bench import samplers


@pytest.mark.parametrize(
    ("name", "flow"), [(n, f) for n, s in samplers.SAMPLERS.items() for f in s.flows if f != "own"]
)
def test_a_row_is_measured(name: str, flow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "aspire" and sys.version_info < (3, 11):
        pytest.skip("aspire needs Python 3.11")
    monkeypatch.setattr(samplers.SAMPLERS[name], "rows", 200)
    monkeypatch.setattr(samplers, "HELD_OUT", 500)
    monkeypatch.setattr(samplers, "TIMES", 1)
    row = samplers.measure(name, flow, 2, 0)
    assert row["epochs"] >= 1 and row["seconds"] > 0 < row["sampling_seconds"]
    assert 1.5 < row["loss"] < 5  # the density itself has 2.14


def test_table_says_what_the_rows_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(sampler: str, flow: str, dim: int, seed: int) -> dict[str, float]:
        seconds = (10.0 if flow == "own" else 2.0) + seed
        return {"seconds": seconds, "epochs": 100, "sampling_seconds": 0.4 if flow == "own" else 0.1, "loss": 2.5}

    monkeypatch.setattr(samplers, "measure", measure)
    monkeypatch.setattr(samplers, "_warm_up", lambda *_: None)
    found = samplers.study(tmp_path, ["nessai"], [2, 3], 3)
    assert len(found["rows"]) == 12
    text = (tmp_path / "samplers.md").read_text()
    assert "| nessai | 3 | own | 11.00 s | 1.0 | 110.0 ms | 400.00 ms | 1.0 | 2.500 |" in text
    assert "| nessai | 3 | glf_fast | 3.00 s | 3.7 | 30.0 ms | 100.00 ms | 4.0 | 2.500 |" in text
    assert "Medians of 3 seeds" in text
