"""zuko's `MonotonicRQSTransform`, and copies of it inside of other packages."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from glf_fast import ops
from glf_fast.integrations.splines.parameters import covered, joined
from glf_fast.reference import Spline

__all__ = ["NAME", "proved", "takes"]

NAME = "MonotonicRQSTransform"
PARAMETERS = ("self", "widths", "heights", "derivatives", "bound", "slope")

Constructor = Callable[..., None]


def takes(kind: Any) -> bool:
    """Whether this is a class of that name with the library's parameters and methods."""
    if not isinstance(kind, type) or kind.__name__ != NAME or "__init__" not in vars(kind):
        return False
    names = tuple(inspect.signature(vars(kind)["__init__"]).parameters)
    return names[:6] == PARAMETERS and all(hasattr(kind, name) for name in ("_call", "_inverse", "call_and_ladj"))


def proved(kind: Any) -> Constructor | None:
    """A constructor for the class, whose objects compute with `ops.spline`, if they are equal to the class's own ones."""
    original = kind.__init__
    fast = _fast(kind, original)

    def __init__(
        self: Any, widths: Any, heights: Any, derivatives: Any, bound: Any = 5.0, slope: Any = 1e-3, **others: Any
    ) -> None:
        parts = (widths, heights, derivatives)
        # A subclass may use anything of an object. Compilers do not follow a change of class, and need no kernels here.
        if type(self) is not kind or torch.compiler.is_compiling() or not _covered(parts, bound, slope):
            original(self, *parts, bound, slope, **others)
            return
        super(kind, self).__init__(**others)
        self.__class__ = fast
        parameters = joined(*parts)
        self._parameters = parameters if torch.is_grad_enabled() else parameters.detach()
        self._options = Spline(widths.shape[-1], -float(bound), float(bound), "linear", "zuko", min_derivative=slope)

    __init__.__defaults__ = original.__defaults__
    return __init__ if _equal(kind, __init__) else None


def _fast(kind: Any, original: Constructor) -> type:
    """The class of the library's objects that were made with the replaced constructor. They go on working without it."""

    class MonotonicRQSTransform(kind):
        _parameters: Tensor
        _options: Spline

        @cached_property
        def _own(self) -> Any:
            """The library's own object."""
            own = kind.__new__(kind)
            with torch.enable_grad():  # not the mode in which somebody asks first
                original(own, *self._parts(), self._options.high, self._options.min_derivative)
            return own

        def _parts(self) -> list[Tensor]:
            K = self._options.bins
            return list(self._parameters.split([K, K, K - 1], -1))

        @property
        def horizontal(self) -> Tensor:
            return self._own.horizontal

        @property
        def vertical(self) -> Tensor:
            return self._own.vertical

        @property
        def derivatives(self) -> Tensor:
            return self._own.derivatives

        @property
        def bins(self) -> int:
            return self._options.bins

        def _call(self, x: Tensor) -> Tensor:
            return self._spline(x, False)[0] if covered(x, self._parameters) else self._own._call(x)

        def _inverse(self, y: Tensor) -> Tensor:
            return self._spline(y, True)[0] if covered(y, self._parameters) else self._own._inverse(y)

        def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self._spline(x, False) if covered(x, self._parameters) else self._own.call_and_ladj(x)

        def _spline(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
            batch = self._parameters.shape[:-1]
            if x.shape != batch:
                x = x.expand(torch.broadcast_shapes(x.shape, batch))
            return ops.spline(x, self._parameters.to(x.dtype), self._options, inverse=inverse)

        def __reduce__(self) -> Any:
            own = (*self._parts(), self._options.high, self._options.min_derivative)
            return kind, own, {"_cache_size": self._cache_size}

    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(MonotonicRQSTransform, name, getattr(kind, name))
    return MonotonicRQSTransform


def _covered(parts: tuple[Any, ...], bound: Any, slope: Any) -> bool:
    """Whether `ops.spline` has these options."""
    if not all(isinstance(part, Tensor) and part.ndim for part in parts):
        return False
    if not all(isinstance(number, int | float) for number in (bound, slope)):
        return False
    widths, heights, derivatives = parts
    *batch, bins = widths.shape
    return (
        2 <= bins <= 32
        and heights.shape == widths.shape
        and derivatives.shape == (*batch, bins - 1)
        and widths.dtype == heights.dtype == derivatives.dtype
        and 0 < bound <= 1e6
        and 0 < slope < 1
    )


def _equal(kind: Any, constructor: Constructor) -> bool:
    """Whether objects made by this constructor give the same as the class's own ones, on random numbers in float64."""
    random = torch.Generator("cpu").manual_seed(0)

    def normal(*size: int) -> Tensor:
        return 3 * torch.randn(size, generator=random, dtype=torch.float64, device="cpu")

    parts, x = [normal(40, 2, n) for n in (5, 5, 4)], normal(40, 2)
    own, fast = (kind.__new__(kind) for _ in range(2))
    try:
        kind.__init__(own, *parts, bound=4.0, slope=2e-3)
        constructor(fast, *parts, bound=4.0, slope=2e-3)
        pairs = [*zip(own.call_and_ladj(x), fast.call_and_ladj(x), strict=True), (own._inverse(x), fast._inverse(x))]
        pairs += [(own._call(x), fast._call(x)), (own.horizontal, fast.horizontal)]
        return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in pairs)
    except Exception:  # whatever a stranger's class does
        return False
