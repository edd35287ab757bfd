"""The splines of nflows, normflows and zuko: replaced ones compute what the libraries' own compute."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from nflows.transforms.base import InputOutsideDomain
from nflows.transforms.splines import rational_quadratic as of_nflows
from normflows.utils import splines as of_normflows
from random_examples import random_examples
from torch import Tensor
from zuko.transforms import MonotonicRQSTransform

from glf_fast.integrations import fast_splines
from glf_fast.integrations.splines.parameters import joined

LIBRARIES = {"nflows": of_nflows, "normflows": of_normflows}
BOX, LINE = "rational_quadratic_spline", "unconstrained_rational_quadratic_spline"


# -- functions ---------------------------------------------------------------------------------------------------------


with fast_splines():
    FAST = {(name, kind): vars(module)[kind] for name, module in LIBRARIES.items() for kind in (BOX, LINE)}
OWN = {(name, kind): vars(module)[kind] for name, module in LIBRARIES.items() for kind in (BOX, LINE)}


def results(function: Callable[..., Any], *tensors: Tensor, **options: Any) -> list[Tensor]:
    """y, log y' and gradients of the tensors."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    y, log_slope = function(*leaves, **options)
    weights = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view(y.shape)
    grads = torch.autograd.grad((y * weights + log_slope * weights.flip(-1)).sum(), leaves, materialize_grads=True)
    return [y.detach(), log_slope.detach(), *grads]


def close(theirs: list[Tensor], ours: list[Tensor], size: float = 1.0) -> None:
    """y to 1e-10, and so the rest, unless parameters are huge: rounding grows as (a bin's slope / a knot's slope)²."""
    for i, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        assert a.dtype == b.dtype
        tolerance = 1e-10 if i == 0 or size <= 1 else 1e-5
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)


@random_examples(
    30, 300,
    case=st.sampled_from([
        ("nflows", BOX, 1), ("nflows", LINE, "linear"), ("normflows", BOX, 1), ("normflows", LINE, "linear"),
        ("normflows", LINE, "circular"), ("normflows", LINE, "list"),
    ]),
    shape=st.sampled_from([(1,), (7,), (5, 3), (2, 3, 4), (2, 1, 3, 2)]),
    bins=st.sampled_from([2, 3, 8, 10, 32]),
    bound=st.sampled_from([1, 3.0, 0.25, 50.0, np.pi]),
    minima=st.sampled_from([(1e-3, 1e-3, 1e-3), (0.02, 0.01, 0.3), (0.0, 1e-3, 0.0)]),
    size=st.sampled_from([0.0, 1.0, 100.0]),
    inverse=st.booleans(),
    seed=st.integers(0, 9999),
)  # fmt: skip
def test_functions_are_the_libraries_own_in_float64(
    case: Any, shape: Any, bins: int, bound: float, minima: Any, size: float, inverse: bool, seed: int
) -> None:
    library, name, tails = case
    size = min(size, 1.0) if 0.0 in minima else size  # more is too much for the libraries: NaN, or a failing assertion
    random = torch.Generator().manual_seed(seed)
    more = {"linear": -1, "circular": 0}.get(tails, 1)
    parts = [size * torch.randn(*shape, n, generator=random, dtype=torch.float64) for n in (bins, bins, bins + more)]
    options: dict[str, Any] = dict(zip(("min_bin_width", "min_bin_height", "min_derivative"), minima, strict=True))
    x = bound * (2 * torch.rand(shape, generator=random, dtype=torch.float64) - 1)
    if name == BOX:
        options.update(left=-bound, right=bound, bottom=-bound, top=bound)
    else:
        x = x * 1.5
        tails = (["linear", "circular", "?"] * 3)[: shape[-1]] if tails == "list" else tails
        options.update(tails=tails, tail_bound=bound)
    theirs, ours = (
        results(functions[library, name], x, *parts, inverse=inverse, **options) for functions in (OWN, FAST)
    )
    close(theirs, ours, size)


@random_examples(
    20, 200,
    shapes=st.sampled_from([((5,), (5,)), ((4, 5, 3), (5, 3)), ((3,), (5, 3)), ((5, 1), (5, 3)), ((), (3,)), ((0, 3), (0, 3))]),
    bins=st.sampled_from([2, 3, 8, 32]),
    bound=st.sampled_from([1, 5.0, np.pi]),
    slope=st.sampled_from([1e-3, 1e-5, 0.3]),
    size=st.sampled_from([0.0, 1.0, 1000.0]),
    inverse=st.booleans(),
    seed=st.integers(0, 9999),
)  # fmt: skip
def test_transforms_are_zukos_own_in_float64(
    shapes: Any, bins: int, bound: float, slope: float, size: float, inverse: bool, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    x = 1.5 * bound * (2 * torch.rand(shapes[0], generator=random, dtype=torch.float64) - 1)
    parts = [size * torch.randn(*shapes[1], n, generator=random, dtype=torch.float64) for n in (bins, bins, bins - 1)]

    def function(x: Tensor, *parts: Tensor) -> Any:
        transform = MonotonicRQSTransform(*parts, bound=bound, slope=slope)
        if inverse:
            return transform.inv(x), transform.log_abs_det_jacobian(transform.inv(x), x)
        return transform.call_and_ladj(x)

    theirs = results(function, x, *parts)
    with fast_splines():
        ours = results(function, x, *parts)
    close(theirs, ours, size)


def zuko_function(x: Tensor, *parts: Tensor, inverse: bool = False) -> Any:
    transform = MonotonicRQSTransform(*parts, bound=3.0)
    return (transform.inv if inverse else transform).call_and_ladj(x)


# name → a library's own function of x in [-3, 3] and the parameters, its replacement, and its derivatives, less its bins
FUNCTIONS: dict[str, tuple[Any, Any, int]] = {
    f"{library} {kind} {tails}": (
        partial(OWN[library, kind], **options), partial(FAST[library, kind], **options), more
    )
    for library, kind, tails, more, options in [
        ("nflows", LINE, "linear", -1, {"tails": "linear", "tail_bound": 3.0}),
        ("nflows", BOX, "", 1, {"left": -3.0, "right": 3.0, "bottom": -3.0, "top": 3.0}),
        ("normflows", BOX, "", 1, {"left": -3.0, "right": 3.0, "bottom": -3.0, "top": 3.0}),
        ("normflows", LINE, "circular", 0, {"tails": "circular", "tail_bound": 3.0}),
        ("normflows", LINE, "list", 1, {"tails": ["linear", "circular"], "tail_bound": 3.0}),
    ]
}  # fmt: skip


def fast_zuko_function(x: Tensor, *parts: Tensor, inverse: bool = False) -> Any:
    with fast_splines():
        return zuko_function(x, *parts, inverse=inverse)


FUNCTIONS["zuko"] = zuko_function, fast_zuko_function, -1
both_ways = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


def example(more: int, bins: int = 8, dtype: torch.dtype = torch.float64, n: int = 50) -> list[Tensor]:
    random = torch.Generator().manual_seed(bins)
    x = 3 * (2 * torch.rand(n, 2, generator=random) - 1)
    return [t.to(dtype) for t in (x, *(torch.randn(n, 2, k, generator=random) for k in (bins, bins, bins + more)))]


@pytest.mark.parametrize("name", FUNCTIONS)
@both_ways
def test_values_on_knots_at_the_bound_and_outside(name: str, inverse: bool) -> None:
    own, fast, more = FUNCTIONS[name]
    x, *parts = example(more)
    raw = parts[1] if inverse else parts[0]
    if name == "zuko":
        raw = raw / (1 - 2 * raw.abs() / math.log(1e-3))
    least = 0.0 if name == "zuko" else 1e-3
    knot = 6 * (least + (1 - 8 * least) * torch.softmax(raw, -1))[..., :4].sum(-1) - 3
    x[::2] = knot[::2]
    x[0], x[1] = -3, 3
    if LINE in name or name == "zuko":
        near = torch.tensor(3.0, dtype=torch.float64)
        x[2], x[3] = near.nextafter(near + 1), -near.nextafter(near + 1)
        x[4], x[5] = 1e30, -1e30
        if name != "zuko":  # whose log-slope is NaN there
            x[6], x[7], x[8] = torch.inf, -torch.inf, torch.nan
    for theirs, ours in zip(own(x, *parts, inverse=inverse), fast(x, *parts, inverse=inverse), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("name", FUNCTIONS)
@both_ways
def test_float32_is_as_exact_as_the_libraries_own(name: str, inverse: bool) -> None:
    own, fast, more = FUNCTIONS[name]
    tensors = example(more, dtype=torch.float32, n=20_000)
    exact = results(partial(own, inverse=inverse), *(t.double() for t in tensors))
    theirs, ours = (results(partial(function, inverse=inverse), *tensors) for function in (own, fast))
    for a, b, right in zip(theirs, ours, exact, strict=True):
        assert a.dtype == b.dtype == torch.float32
        a, b = ((found.double() - right).abs().flatten()[:200_000] for found in (a, b))
        for share in (0.5, 0.9, 0.99):  # a few elements lose most digits, in both, at random
            # y 0.3 to 0.6, log-slopes 0.2 to 0.7, gradients 0.2 to 1.1, but those of widths in inverses up to 1.35: a few
            # elements decide, of which 4,000 splines have too few.
            assert b.quantile(share) <= 1.5 * a.quantile(share)


@pytest.mark.parametrize("name", FUNCTIONS)
@both_ways
def test_second_derivatives(name: str, inverse: bool) -> None:
    own, fast, more = FUNCTIONS[name]
    tensors = [t.requires_grad_() for t in example(more, bins=3, n=5)]

    def second(function: Any) -> list[Tensor]:
        y, log_slope = function(*tensors, inverse=inverse)
        grads = torch.autograd.grad((y.square() + log_slope.square()).sum(), tensors, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in grads), tensors))

    for theirs, ours in zip(second(own), second(fast), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_transforms_of_functions(name: str) -> None:
    own, fast, more = FUNCTIONS[name]
    x, *parts = example(more, bins=3, n=5)

    def by_samples(function: Any) -> Tensor:
        def one(widths: Tensor) -> Tensor:
            return sum(result.sum() for result in function(x, widths, *parts[1:]))

        return torch.func.jacrev(torch.func.grad(one))(parts[0])

    torch.testing.assert_close(by_samples(fast), by_samples(own), rtol=1e-10, atol=1e-10)
    if name.startswith("normflows " + BOX):
        for theirs, ours in zip(own(x, *parts), torch.vmap(fast)(x, *parts), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def half(dtype: torch.dtype) -> Any:
    return lambda tensors: [t.to(dtype) for t in tensors]


# what `ops.spline` has not, as a library, its function, its options, and what is done to the tensors, of K + n derivatives
FALLBACKS: dict[str, tuple[str, str, int, dict[str, Any], Any]] = {
    "no square": ("nflows", BOX, 1, {"left": -3, "right": 3, "bottom": 0, "top": 1}, None),
    "outside": ("nflows", BOX, 1, {"right": 0.5}, None),
    "outside, normflows": ("normflows", BOX, 1, {"right": 0.5}, None),
    "NaN": ("nflows", BOX, 1, {"left": -3, "right": 3, "bottom": -3, "top": 3}, lambda t: [t[0] * torch.nan, *t[1:]]),
    "empty": ("nflows", BOX, 1, {}, lambda tensors: [t[:0] for t in tensors]),
    "one x for many": ("nflows", BOX, 1, {"left": -3, "right": 3, "bottom": -3, "top": 3}, lambda t: [t[0][:1], *t[1:]]),
    "bound of tensors": ("normflows", LINE, -1, {"tail_bound": torch.tensor([1.0, 2.0], dtype=torch.float64)}, None),
    "bound of NumPy": ("nflows", LINE, -1, {"tail_bound": np.float32(2)}, None),
    "unknown tails": ("nflows", LINE, 0, {"tails": "circular"}, None),
    "unknown tails, normflows": ("normflows", LINE, 0, {"tails": "?"}, None),
    "list too short": ("normflows", LINE, 1, {"tails": ["linear"]}, None),
    "more derivatives": ("nflows", LINE, 1, {}, None),
    "one bin": ("nflows", LINE, -1, {}, lambda t: [t[0], t[1][..., :1], t[2][..., :1], t[3][..., :0]]),
    "many bins": ("nflows", LINE, -1, {}, lambda t: [t[0], *(t[1].repeat(1, 1, 5)[..., :n] for n in (40, 40, 39))]),
    "minima": ("nflows", LINE, -1, {"min_bin_width": 0.2}, None),
    "steep": ("normflows", LINE, -1, {"min_derivative": 1.5}, None),
    "float16": ("normflows", LINE, -1, {"tail_bound": 3.0}, half(torch.float16)),
    "bfloat16": ("nflows", LINE, -1, {"tail_bound": 3.0}, half(torch.bfloat16)),
    "mixed": ("nflows", LINE, -1, {"tail_bound": 3.0}, lambda t: [t[0], *(p.float() for p in t[1:])]),
    "other argument": ("nflows", LINE, -1, {"enable_identity_init": True}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_is_not_covered_goes_to_the_librarys_own_function(name: str) -> None:
    library, kind, more, options, change = FALLBACKS[name]
    tensors = example(more)
    tensors = change(tensors) if change else tensors
    found = []
    for functions in (OWN, FAST):
        try:
            found.append(list(functions[library, kind](*tensors, **options)))
        except Exception as error:
            found.append([type(error), str(error)])
    theirs, ours = found
    if name == "outside":
        assert ours[0] is InputOutsideDomain
    if isinstance(theirs[0], Tensor):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    else:
        assert ours == theirs


def test_under_autocast_results_are_as_exact_as_the_libraries_own() -> None:
    x, *parts = example(-1, dtype=torch.float32, n=1000)
    parts = [part.bfloat16() for part in parts]
    own, fast, _ = FUNCTIONS["nflows " + LINE + " linear"]
    exact, _ = own(x.double(), *(part.double() for part in parts))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (theirs, _), (ours, _) = own(x, *parts), fast(x, *parts)
    assert theirs.dtype == ours.dtype == torch.float32
    assert 20 * (ours - exact).norm() < (theirs - exact).norm()


# -- three tensors as one ----------------------------------------------------------------------------------------------


def in_place(p: Tensor) -> Any:
    widths, heights, derivatives = p.view(4, 3, 23).split([8, 8, 7], -1)
    return widths, heights, derivatives


def scaled(p: Tensor) -> Any:
    q = p.view(4, 3, 23)
    widths, heights = q[..., :8], q[..., 8:16]
    widths /= 7.0
    heights /= 7.0
    return widths, heights, q[..., 16:]


def retained(p: Tensor) -> Any:
    parts = p.view(4, 3, 23).split([8, 8, 7], -1)
    parts[0].retain_grad()
    return parts


# what a library, or a user, may hand over, and whether it is one tensor as it is
SLICES: dict[str, tuple[Any, bool]] = {
    "columns": (lambda p: p.view(4, 3, 23).split([8, 8, 7], -1), True),
    "changed in place": (scaled, True),
    "retained": (retained, False),
    "in another order": (lambda p: p.view(4, 3, 23).split([8, 8, 7], -1)[::-1], False),
    "not all": (lambda p: p.view(4, 3, 23).split([8, 8, 7], -1)[:2], False),
    "images": (lambda p: p.view(4, 23, 3).permute(0, 2, 1).split([8, 8, 7], -1), False),
    "expanded": (lambda p: p[:1].view(1, 3, 23).expand(4, 3, 23).split([8, 8, 7], -1), False),
    "detached": (lambda p: (p[:, :9].detach(), *p.split([9, 60], 1)[1:]), False),
    "a parameter's": (lambda p: torch.nn.Parameter(p.detach()).split([9, 60], 1), True),
}  # fmt: skip


@pytest.mark.parametrize("name", SLICES)
def test_joined_parts_are_their_concatenation(name: str) -> None:
    slices, whole = SLICES[name]
    leaf = torch.randn(4, 69, dtype=torch.float64, requires_grad=True)
    found = []
    for join in (lambda *parts: torch.cat(parts, -1), joined):
        p = leaf * 1
        parts = slices(p)
        result = join(*parts)
        grads = torch.autograd.grad(result.square().sum(), leaf, allow_unused=True, retain_graph=True)
        if name == "retained":
            result.sum().backward()
            grads += (parts[0].grad,)
        found.append([result, *grads])
    assert (result.data_ptr() == parts[0].data_ptr()) == whole
    with torch.no_grad():
        assert (joined(*parts).data_ptr() == parts[0].data_ptr()) == (whole or name == "retained")
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
