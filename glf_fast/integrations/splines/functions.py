"""The spline functions of nflows and normflows, and of the many copies of them inside of other packages.

`rational_quadratic_spline` works in a box; `unconstrained_rational_quadratic_spline` continues it outside.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from glf_fast import ops
from glf_fast.integrations.splines.parameters import covered, joined
from glf_fast.ops.backends import ordinary
from glf_fast.reference import Spline

__all__ = ["NAMES", "proved", "takes"]

Function = Callable[..., tuple[Tensor, Tensor]]

BOX, LINE = NAMES = ("rational_quadratic_spline", "unconstrained_rational_quadratic_spline")
_TENSORS = ("inputs", "unnormalized_widths", "unnormalized_heights", "unnormalized_derivatives", "inverse")
_MINIMA = ("min_bin_width", "min_bin_height", "min_derivative")
PARAMETERS = {
    BOX: (*_TENSORS, "left", "right", "bottom", "top", *_MINIMA),
    LINE: (*_TENSORS, "tails", "tail_bound", *_MINIMA),
}
# Tails as the libraries name them → the columns of derivatives, less the number of bins. A list has a name for each feature.
COLUMNS = {"linear": -1, "circular": 0, "list": 1}


def takes(function: Any) -> bool:
    """Whether this is a function of one of those names with the libraries' parameters, and perhaps more behind them."""
    if not isinstance(function, FunctionType) or function.__name__ not in NAMES:
        return False
    wanted = PARAMETERS[function.__name__]
    names = tuple(inspect.signature(function).parameters)
    return names[: len(wanted)] == wanted and len(function.__defaults__ or ()) >= len(wanted) - 4


def proved(original: Function) -> Function | None:
    """A function that can stand for the original, as far as both were found equal on random numbers; None if nowhere."""
    if original.__name__ == BOX:
        function = _in_box(original)
        return _with_defaults(function, original) if _equal(original, function, 1) else None
    tails = [
        name for name, more in COLUMNS.items() if _equal(original, _on_line(original, (name,)), more, **_example(name))
    ]
    return _with_defaults(_on_line(original, tails), original) if tails else None


def _with_defaults(function: Any, original: Any) -> Function:
    """The function, named as the original, with its default values."""
    function.__defaults__ = original.__defaults__[: len(function.__defaults__)]
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(function, name, getattr(original, name))
    function.__wrapped__ = original
    return function


# -- the functions -----------------------------------------------------------------------------------------------------


def _in_box(original: Function) -> Function:
    def rational_quadratic_spline(
        inputs: Any, unnormalized_widths: Any, unnormalized_heights: Any, unnormalized_derivatives: Any,
        inverse: bool = False, left: Any = 0.0, right: Any = 1.0, bottom: Any = 0.0, top: Any = 1.0,
        min_bin_width: Any = 1e-3, min_bin_height: Any = 1e-3, min_derivative: Any = 1e-3, *more: Any, **others: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        parts = (unnormalized_widths, unnormalized_heights, unnormalized_derivatives)
        numbers = (left, right, bottom, top, min_bin_width, min_bin_height, min_derivative)
        # Outside of the box each library has an error of its own. To look is to wait for a GPU, as nflows does; torch.compile,
        # vmap and the like cannot look.
        if (
            not more and not others and ordinary()
            and _alike(inputs, parts, 1) and _usual(numbers, parts) and (bottom, top) == (left, right)
            and inputs.numel() and bool(((inputs >= left) & (inputs <= right)).all())
        ):  # fmt: skip
            return _spline(inputs, joined(*parts), "none", left, right, numbers[4:], inverse)
        return original(inputs, *parts, inverse, *numbers, *more, **others)

    return rational_quadratic_spline


def _on_line(original: Function, supported: Collection[str]) -> Function:
    def unconstrained_rational_quadratic_spline(
        inputs: Any, unnormalized_widths: Any, unnormalized_heights: Any, unnormalized_derivatives: Any,
        inverse: bool = False, tails: Any = "linear", tail_bound: Any = 1.0,
        min_bin_width: Any = 1e-3, min_bin_height: Any = 1e-3, min_derivative: Any = 1e-3, *more: Any, **others: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        parts = (unnormalized_widths, unnormalized_heights, unnormalized_derivatives)
        minima = (min_bin_width, min_bin_height, min_derivative)
        kind = "list" if isinstance(tails, list | tuple) else tails
        if (
            not more and not others and isinstance(kind, str) and kind in supported
            and _alike(inputs, parts, COLUMNS[kind])
            and _number(tail_bound) and _usual((-tail_bound, tail_bound, *minima), parts)
            and (kind != "list" or len(tails) == inputs.shape[-1])
        ):  # fmt: skip
            if kind != "list":
                return _spline(inputs, joined(*parts), kind, -tail_bound, tail_bound, minima, inverse)
            parameters = torch.cat(_with_ends(parts, tails, min_derivative), -1)
            y, log_slope = _spline(inputs, parameters, "none", -tail_bound, tail_bound, minima, inverse)
            # With a list of tails normflows 1.7 returns 0 outside of the box, not x. A copy that does not is left as it is.
            return torch.where((inputs >= -tail_bound) & (inputs <= tail_bound), y, 0.0), log_slope
        return original(inputs, *parts, inverse, tails, tail_bound, *minima, *more, **others)

    return unconstrained_rational_quadratic_spline


def _spline(
    x: Tensor, parameters: Tensor, tails: str, low: float, high: float, minima: Sequence[float], inverse: bool
) -> tuple[Tensor, Tensor]:
    bins = (parameters.shape[-1] - {"linear": -1, "circular": 0, "none": 1}[tails]) // 3
    options = Spline(bins, float(low), float(high), tails, "nflows", *map(float, minima))
    return ops.spline(x, parameters.to(x.dtype), options, inverse=bool(inverse))


def _with_ends(parts: tuple[Tensor, ...], tails: Sequence[str], min_derivative: float) -> list[Tensor]:
    """Widths, heights and K + 1 derivatives, of which each feature's tails decide the first and the last one."""
    widths, heights, derivatives = parts
    linear = torch.tensor([tail == "linear" for tail in tails], device=widths.device)[:, None]
    circular = torch.tensor([tail == "circular" for tail in tails], device=widths.device)[:, None]
    one = math.log(math.expm1(1 - min_derivative))  # makes a slope of 1
    first = torch.where(linear, one, derivatives[..., :1])
    last = torch.where(linear, one, torch.where(circular, first, derivatives[..., -1:]))
    return [widths, heights, first, derivatives[..., 1:-1], last]


# -- what `ops.spline` can do ------------------------------------------------------------------------------------------


def _alike(x: Any, parts: tuple[Any, ...], more: int) -> bool:
    """Whether these are tensors of shapes that belong together, with so many derivatives more than bins."""
    if not all(isinstance(tensor, Tensor) for tensor in (x, *parts)) or not covered(x, *parts):
        return False
    widths, heights, derivatives = parts
    bins = widths.shape[-1] if widths.ndim else 0
    return (
        2 <= bins <= 32
        and widths.shape == heights.shape == (*x.shape, bins)
        and derivatives.shape == (*x.shape, bins + more)
    )


def _number(value: Any) -> bool:
    return isinstance(value, int | float)  # float64 of numpy is a float


def _usual(numbers: tuple[Any, ...], parts: tuple[Tensor, ...]) -> bool:
    """Whether these are left, right, any more numbers, and three minima that leave room for the bins."""
    if not all(map(_number, numbers)):
        return False
    bins = parts[0].shape[-1]
    left, right, (width, height, derivative) = numbers[0], numbers[1], numbers[-3:]
    room = 0 <= width * bins < 1 and 0 <= height * bins < 1
    return -1e6 <= left < right <= 1e6 and room and 0 < derivative < 1


# -- the proof ---------------------------------------------------------------------------------------------------------


def _example(tails: str) -> dict[str, Any]:
    return {"tails": ["linear", "circular"] if tails == "list" else tails, "tail_bound": 1.5}


def _equal(original: Function, function: Function, more: int, **options: Any) -> bool:
    """Whether both give the same on random numbers in float64, some of them on the box and, with tails, outside of it."""
    random = torch.Generator("cpu").manual_seed(0)
    size, bins, bound = (40, 2), 5, options.get("tail_bound", 1.0)
    low = -bound if options else 0.0
    x = low + (bound - low) * torch.rand(size, generator=random, dtype=torch.float64, device="cpu")
    if options:
        x[:8] *= 3
    x[8], x[9] = low, bound
    parts = [
        3 * torch.randn((*size, n), generator=random, dtype=torch.float64, device="cpu")
        for n in (bins, bins, bins + more)
    ]
    minima = dict(zip(_MINIMA, (2e-3, 3e-3, 4e-3), strict=True))
    for inverse in (False, True):
        try:
            wanted = original(x, *parts, inverse, **options, **minima)
        except Exception:  # whatever a stranger's function does with tails that it does not know
            return False
        for theirs, ours in zip(wanted, function(x, *parts, inverse, **options, **minima), strict=True):
            if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=1e-9, atol=1e-9):
                return False
    return True
