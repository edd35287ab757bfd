"""The elementwise kernel, interpreted, against the float64 reference: every formula, order of memory and precision."""

import itertools
import math
from functools import partial

import forked
import pytest
import torch
from flow_values import check_bayesflows_scale, derivatives
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glf_fast import ops, reference, use_backend
from glf_fast.kernels import affine_coupling
from glf_fast.kernels.affine_coupling import coupling_backward, coupling_forward
from glf_fast.kernels.launch import count_launches
from glf_fast.reference import LOG_SCALES

pytestmark = pytest.mark.usefixtures("interpreted")
FORMULAS = list(itertools.product(LOG_SCALES, (False, True), (False, True)))


def error(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def gradients(
    v: Tensor, u: Tensor, t: Tensor, grads: tuple[Tensor, Tensor], **options: object
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
    leaves = [x.detach().requires_grad_() for x in (v, u, t)]
    out = ops.affine_coupling(*leaves, **options)  # type: ignore[arg-type]
    return out, torch.autograd.grad(out, leaves, [g.to(o.dtype) for g, o in zip(grads, out, strict=True)])


def check(v: Tensor, u: Tensor, t: Tensor, tolerance: float, **options: object) -> None:
    """Outputs and gradients against the reference in float64, with gradients that are not in order either."""
    g = torch.Generator().manual_seed(5)
    grad_w = torch.randn((*v.shape[:-1], 2 * v.shape[-1]), generator=g)[..., ::2]
    grads = (grad_w, torch.randn(len(v), generator=g))
    with use_backend("reference"):
        exact = gradients(v.double(), u.double(), t.double(), grads, **options)
    with count_launches() as launches:
        out, found = gradients(v, u, t, grads, **options)
    assert launches == (["coupling_kernel", "coupling_backward_kernel"] if v.numel() else [])
    for ours, theirs in zip((*out, *found), (*exact[0], *exact[1]), strict=True):
        assert ours.shape == theirs.shape
        # The interpreter truncates to bfloat16, where a GPU rounds: an error of up to 2⁻⁷.
        assert error(ours, theirs) < (tolerance if ours.dtype == torch.float32 else 2**-7)
    assert [x.dtype for x in found] == [v.dtype, u.dtype, t.dtype]
    assert out[0].dtype == out[1].dtype == torch.float32
    if v.ndim == 4 and v.is_contiguous(memory_format=torch.channels_last) and v.shape[1] > 1:
        assert out[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("log_scale", "add_first", "inverse"), FORMULAS)
def test_every_formula(log_scale: str, add_first: bool, inverse: bool) -> None:
    g = torch.Generator().manual_seed(0)
    v, u, t = (2 * torch.randn(5, 37, generator=g) for _ in range(3))
    check(v, u, t, 2e-6, log_scale=log_scale, add_first=add_first, inverse=inverse)


@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value):RuntimeWarning")  # of ±∞
def test_bayesflows_scale_of_large_numbers() -> None:
    check_bayesflows_scale()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_order_and_precision(data: st.DataObject) -> None:
    draw = data.draw
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    batch = draw(st.sampled_from([0, 1, 2, 7]))
    image = draw(st.booleans())
    channels = draw(st.integers(1, 6) if image else st.sampled_from([1, 3, 16, 33, 1100]))
    pixels = draw(st.tuples(st.integers(1, 6), st.integers(1, 6))) if image else ()
    low = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))

    def operand(dtype: torch.dtype) -> Tensor:
        orders = ["plain", "chunk", "channels-last", "chunk of channels-last", "reversed"]
        order = draw(st.sampled_from([*orders, "columns"] if image and 1 in pixels else orders))
        x = torch.randn((batch, 2 * channels, *pixels), generator=g).to(dtype)
        if image and "channels-last" in order:
            x = x.to(memory_format=torch.channels_last)
        if order == "columns":  # one column or one row, made of sequences: torch does not look at that stride
            rows = torch.randn((batch, max(pixels), 2 * channels), generator=g).to(dtype).transpose(1, 2)
            x = rows.unsqueeze(2 if pixels[0] == 1 else 3)
        if order == "reversed":
            x = x.transpose(0, -1).contiguous().transpose(0, -1)
        return x[:, :channels].clone() if order in ("plain", "channels-last") else x[:, channels:]

    options = dict(zip(("log_scale", "add_first", "inverse"), draw(st.sampled_from(FORMULAS)), strict=True))
    v, u, t = operand(torch.float32), operand(low), operand(low)
    check(v, u, t, 3e-6, **options)
    check_units(v, u, t)


def check_units(*operands: Tensor) -> None:
    """UNIT is what the compiler believes of distances and addresses, which the interpreter would not notice."""
    last = affine_coupling.is_channels_last(operands[0])
    readable = [affine_coupling._readable(x, last) for x in operands]
    layout, distances = affine_coupling._layout(readable, last)
    # All places of elements that a vector load may start at, from the operands' own strides.
    shape = operands[0].shape
    numbers = [math.prod(shape[1:]), shape[1] if last else 0]
    for x in readable:
        numbers += [x.data_ptr() // x.element_size(), x.stride(0)]
        if last:
            numbers += [x.stride(i) for i in (2, 3) if shape[i] > 1]
    assert all(number % layout["UNIT"] == 0 for number in numbers), (layout, numbers)
    if all(number % (2 * layout["UNIT"]) == 0 for number in numbers):
        assert layout["UNIT"] == affine_coupling.LARGEST_UNIT
    assert [distance * layout["UNIT"] for distance in distances[:3]] == [x.stride(0) for x in readable]


@pytest.mark.parametrize(
    ("shape", "order"),
    [
        ((2, 30_011), torch.contiguous_format),
        ((3, 5, 90, 67), torch.contiguous_format),
        ((3, 5, 90, 67), torch.channels_last),
        ((1, 12, 64, 64), torch.channels_last),
    ],
)
def test_few_large_samples_are_shared(shape: tuple[int, ...], order: torch.memory_format) -> None:
    g = torch.Generator().manual_seed(0)
    v = torch.randn(shape, generator=g).to(memory_format=order)
    u, t = torch.randn((shape[0], 2 * shape[1], *shape[2:]), generator=g).to(memory_format=order).chunk(2, 1)
    parts = -(-math.prod(shape[1:]) // affine_coupling.LARGEST_TILE)
    assert parts > affine_coupling.TURNS_SAVED
    assert affine_coupling._forward(v, u, t)[1].shape == (shape[0], parts)
    check(v, u, t, 3e-6)
    formula = ("tanh", 2.0, False, False)
    assert torch.equal(coupling_forward(v, u, t, *formula)[1], coupling_forward(v, u, t, *formula)[1])


def test_the_fewer_samples_the_larger_their_tiles() -> None:
    found = {}
    for rows in (1, 63, 64, 128, 129, 255, 256, 5000):
        v = torch.empty(rows, 12, 16, 16, device="meta")
        _, logdet, call = affine_coupling._forward(v, v, v)
        assert logdet.shape == (rows,) and call.programs == rows
        found[rows] = call.constants["BN"]
    assert found == {1: 4096, 63: 4096, 64: 4096, 128: 2048, 129: 2048, 255: 2048, 256: 1024, 5000: 1024}


def test_the_gate_compiles_what_is_launched_and_loads_are_wide() -> None:
    code = r"""
import re, sys, torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from glf_fast.kernels import affine_coupling
from specialization import couplings
from triton_resources import compiled

class Target:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

driver.set_active(Target())
launched = []
def launch(kernel, programs, device, *arguments, **constants):
    launched.append(kernel.warmup(*arguments, **constants, enable_fp_fusion=True, grid=(programs,)))
affine_coupling.launch = launch
gate = {spec.name: spec for spec in couplings()}
for name, shape, wide in (
    ("channels-last images", (4096, 24, 16, 16), 4),
    ("few channels-last images", (64, 12, 16, 16), 4),
    ("few channels-last images of 6", (64, 6, 16, 16), 2),
):
    # The numbers are not read: as long as a tensor has one, every byte of a large one is address space alone.
    twice = torch.empty((shape[0], 2 * shape[1], *shape[2:]), memory_format=torch.channels_last)
    u, t = twice.chunk(2, 1)
    formula = ("tanh", 2.0, False, False)
    w, logdet = affine_coupling.coupling_forward(t, u, t, *formula)
    affine_coupling.coupling_backward(w, logdet, t, u, t, *formula)
    for direction, operands, kernel in zip(("forward", "backward"), (3, 3), launched[-2:]):
        ptx = compiled(gate[f"coupling {direction} {name}"], 90).asm["ptx"]
        assert ptx == kernel.asm["ptx"], name
        loads = re.findall(r"ld[.]global(?:[.]v(\d))?", ptx)
        # Gradients without ADD_FIRST need no t, but ∂logdet: one number.
        numbers = [] if direction == "forward" else [""]
        assert loads == numbers + [str(wide)] * (operands * 4 // wide), (name, direction, loads)
"""
    done = forked.compiler(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("log_scale", "add_first", "inverse"), FORMULAS)
def test_derivatives_of_both_orders(log_scale: str, add_first: bool, inverse: bool) -> None:
    """As the reference's, which are PyTorch's own."""
    torch.manual_seed(0)
    leaves = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    options = {"log_scale": log_scale, "add_first": add_first, "inverse": inverse}
    ours, exact = (derivatives(partial(op.affine_coupling, **options), leaves) for op in (ops, reference))
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("last", [False, True])
def test_opcheck(last: bool) -> None:
    x = torch.randn(2, 6, 4, 4)
    v, u, t = x.to(memory_format=torch.channels_last if last else torch.contiguous_format).chunk(3, 1)
    code = ("tanh", 2.0, False, False)
    checks = ("test_schema", "test_faketensor")  # gradients are registered outside the op, in an autograd.Function
    torch.library.opcheck(torch.ops.glf_fast.triton_affine_coupling.default, (v, u, t, *code), test_utils=checks)
    w, logdet = torch.ops.glf_fast.triton_affine_coupling.default(v, u, t, *code)
    backward = (w, logdet, v, u, t, *code)
    torch.library.opcheck(torch.ops.glf_fast.triton_affine_coupling_backward.default, backward, test_utils=checks)


def test_compiles_in_one_graph_with_sizes_that_change() -> None:
    torch.compiler.reset()

    def run(v: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        u, t = raw.chunk(2, 1)
        return ops.affine_coupling(v, u, t, log_scale="glow")

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 5):
        v, raw = torch.randn(batch, 3, 4, 4, requires_grad=True), torch.randn(batch, 6, 4, 4, requires_grad=True)
        for ours, theirs in zip(compiled(v, raw), run(v, raw), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, which the interpreter computes with
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_numbers_stay_in_their_row_and_do_not_vanish(bad: float) -> None:
    torch.manual_seed(0)
    for log_scale, add_first, inverse in FORMULAS:
        for place in range(3):
            operands = [torch.randn(3, 20) for _ in range(3)]
            operands[place][1, 7] = bad
            options = {"log_scale": log_scale, "add_first": add_first, "inverse": inverse}
            ours = ops.affine_coupling(*operands, **options)
            theirs = reference.affine_coupling(*operands, **options)
            for a, b in zip(ours, theirs, strict=True):
                assert torch.equal(a.isfinite(), b.isfinite()), (options, place)
                assert torch.equal(a.isnan(), b.isnan()), (options, place)


def test_far_apart_rows_are_reached_with_64_bit_offsets() -> None:
    """Rows 2³⁰ numbers apart: the third starts beyond what 32 bits count. The memory between them is never touched."""
    far = torch.empty(0).set_(torch.UntypedStorage(4 * ((2 << 30) + 64)), 0, (3, 16), (1 << 30, 1))
    far.copy_(torch.randn(3, 16))
    u, t = torch.randn(3, 16), torch.randn(3, 16)
    arguments = ("tanh", 2.0, False, False)
    w, logdet = coupling_forward(far, u, t, *arguments)
    exact = reference.affine_coupling(far.double(), u.double(), t.double())
    assert error(w, exact[0]) < 1e-6 and error(logdet, exact[1]) < 1e-6
    for ours, near in zip(
        coupling_backward(w, logdet, far, u, t, *arguments),
        coupling_backward(w, logdet, far.contiguous(), u, t, *arguments),
        strict=True,
    ):
        assert torch.equal(ours, near)


@pytest.mark.parametrize("place", [2, 3])
def test_images_of_one_row_or_column_made_of_sequences(place: int) -> None:
    g = torch.Generator().manual_seed(0)
    v, u, t = (torch.randn(4, 9, 6, generator=g).transpose(1, 2).unsqueeze(place) for _ in range(3))
    check(v, u, t, 3e-6)
    check(
        v[:, :, ::2] if place == 3 else v[..., ::2],
        *(torch.randn(4, 6, *((5, 1) if place == 3 else (1, 5))),) * 2,
        3e-6,
    )
