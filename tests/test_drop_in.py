"""docs/drop-in.md: its table is made of results."""

import statistics
from pathlib import Path
from typing import Any

import pytest

from bench import drop_in
from bench.results import Result, Results, stats


def test_table_is_made_of_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def result(suite: str, case: str, mode: str, provider: str, times: list[float], **info: Any) -> Result:
        return Result(suite, case, mode, provider, stats(times), info)

    scores = [0.6, 0.7]
    found = Results(
        {"cpu": {"brand_raw": "A processor"}, "cores": 2, "torch": "2.13"},
        "2026-01-02T03:04",
        [
            result("convert", "small of zuko", "train", "original", [3.0]),
            result("convert", "small of zuko", "train", "glf_fast", [2.0]),
            result("convert", "small of zuko NICE", "log_prob", "original", [5.0]),
            result("convert", "small of zuko NICE", "log_prob", "glf_fast", [2.0]),
            result("two_moons", "two-moons", "npe", "sbi", [60.0], c2st=scores, simulations=10),
            result("two_moons", "two-moons", "npe", "glf_fast", [20.0], c2st=scores, simulations=10),
        ],
    )
    text = "\n".join(drop_in.lines(found))
    assert "| small of zuko | 1.5 |  |" in text and "| small of zuko NICE |  | 2.5 |" in text
    assert "A processor, 2 cores, torch 2.13, 2026-01-02" in text
    assert f"| sbi | 60 s | 0.650 ± {statistics.stdev(scores):.3f} | 2 |" in text and "| glf_fast | 20 s |" in text
    assert not list(drop_in.lines(Results(found.machine, found.date, [])))
