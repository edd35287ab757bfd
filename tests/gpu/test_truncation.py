"""Without a GPU: what matrix units lose in full precision, which test_values.py allows there and nowhere else."""

from contextlib import nullcontext

import pytest
import torch
from exact_flows import DIRECTIONS, SIZES, error, run, tensors
from matrix_units import DEPTH, TruncatingUnits, _tf32

from glf_fast import reference

ROWS = 290  # no layer's width


def errors(size: str, direction: str, units: TruncatingUnits | None) -> list[float]:
    """Of the results and gradients of a flow of three steps in float32."""
    dim, hidden, context = SIZES[size]
    values = tensors("cpu", ROWS, 3, dim, context, hidden, direction)
    op = getattr(reference, DIRECTIONS[direction])
    exact = run(op, values, torch.float64)
    with units or nullcontext():
        found = run(op, values, torch.float32)
    # An affine map and each layer, in both passes.
    assert units is None or units.products == 3 * 2 * (2 + len(hidden))
    return [error(a, b) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("size", SIZES)
def test_truncated_sums_have_several_times_the_error_of_rounded_ones(size: str, direction: str) -> None:
    """4.3 to 13.4 times for the longest sums, the results' worst: more than the two that plain float32 would allow."""
    pairs = zip(errors(size, direction, TruncatingUnits(DEPTH, ROWS)), errors(size, direction, None), strict=True)
    assert 3 < max(truncated / plain for truncated, plain in pairs) < 16


def test_short_sums_lose_less() -> None:
    plain = errors("medium", "forward", None)

    def times(depth: int) -> float:
        return max(a / b for a, b in zip(errors("medium", "forward", TruncatingUnits(depth, ROWS)), plain, strict=True))

    assert times(256) > times(128) > times(64) > times(16) > 1


class WithoutCorrections(TruncatingUnits):
    """One product of rounded operands where there should be three: 256 to 6,900 times the error."""

    def _product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return _tf32(a) @ _tf32(b)


def test_a_lost_correction_is_far_outside() -> None:
    lost, truncated = (errors("medium", "forward", how(DEPTH, ROWS)) for how in (WithoutCorrections, TruncatingUnits))
    assert min(a / b for a, b in zip(lost, truncated, strict=True)) > 100
