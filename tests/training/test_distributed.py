"""Training by several processes: they are one process, to the order of sums."""

from pathlib import Path

import pytest
import several_processes
import torch
from several_processes import CASES

from glf_fast import models


@pytest.fixture(scope="module")
def alone() -> dict[str, dict]:
    """The curves of one process."""
    return {case: several_processes.curve(case) for case in CASES}


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.long)])
def test_several_processes_train_every_model_as_one_does(count: int, alone: dict[str, dict], tmp_path: Path) -> None:
    assert set(models.names()) <= {name for name, _ in CASES.values()}
    together = several_processes.saved(count, list(CASES), tmp_path)
    for case, expected in alone.items():
        found = together[case]
        assert len(found["losses"]) == len(expected["losses"]) >= 4
        for step, (a, b) in enumerate(zip(found["losses"], expected["losses"], strict=True)):
            assert a == pytest.approx(b, rel=1e-6, abs=1e-9), (case, step)
        torch.testing.assert_close(found["weights"], dict(expected["weights"]), rtol=1e-5, atol=1e-6)
