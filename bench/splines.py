"""Rational-quadratic splines of single numbers by ours, by plain PyTorch, by torch.compile, and by three libraries."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

from torch import Tensor, randn_like

from bench.cases import SplineCase
from bench.check import operation
from bench.compiler import compiled
from bench.libraries import LIBRARIES as ALL_LIBRARIES
from bench.race import Clock, Job, Provider
from glf_fast import Spline, ops, reference

__all__ = ["LIBRARIES", "PROVIDERS"]

# Library → the parametrization that its function has: its results are checked, too.
LIBRARIES = {"nflows": "nflows", "normflows": "nflows", "zuko": "zuko"}
OURS = ("glf_fast", "eager", "compile")


def _job(name: str, case: SplineCase, mode: str, clock: Clock, seed: int = 0) -> Job:
    """y and log y', or the gradients of x and the parameters; `seed` makes other tensors of the same case."""
    inputs = case.inputs(clock.DEVICE, seed)
    gradients = [randn_like(inputs[0]) for _ in range(2)]
    options = Spline(case.bins, parametrization=LIBRARIES.get(name, "madnis"))
    exact = partial(reference.spline, options=options)
    job = operation(partial(_function(name), options=options), exact, inputs, gradients, mode)
    job.again = lambda: _job(name, case, mode, clock, seed + 1)
    job.alone = name in OURS
    return job


@cache
def _function(name: str) -> Callable[..., Any]:
    """Called as reference.spline is."""
    if name == "glf_fast":
        return ops.spline
    if name == "zuko":
        return _zuko
    if name in LIBRARIES:
        return partial(_durkan, name)
    return compiled(reference.spline) if name == "compile" else reference.spline


def _durkan(
    library: str, x: Tensor, parameters: Tensor, options: Spline, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """The function of Neural Spline Flows' authors, which nflows and normflows both have."""
    if library == "nflows":
        from nflows.transforms.splines import unconstrained_rational_quadratic_spline as function
    else:
        from normflows.utils.splines import unconstrained_rational_quadratic_spline as function
    widths, heights, slopes = parameters.split([options.bins, options.bins, options.bins - 1], -1)
    return function(x, widths, heights, slopes, inverse=inverse, tails="linear", tail_bound=options.high)


def _zuko(x: Tensor, parameters: Tensor, options: Spline, inverse: bool = False) -> tuple[Tensor, Tensor]:
    from zuko.transforms import MonotonicRQSTransform

    transform = MonotonicRQSTransform(*parameters.split([options.bins, options.bins, options.bins - 1], -1))
    return (transform.inv if inverse else transform).call_and_ladj(x)


def _why_not(name: str, case: SplineCase, mode: str, device: str) -> str:
    return ALL_LIBRARIES[name].why_not() if name in LIBRARIES else ""


PROVIDERS = {name: Provider(name, partial(_job, name), partial(_why_not, name)) for name in (*OURS, *LIBRARIES)}
