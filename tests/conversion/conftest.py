"""What every converted flow is put through, whatever library it comes from."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glf_fast import AutoregressiveFlow, CouplingFlow, Flow, accelerate
from glf_fast.conversion import _converted, convert
from glf_fast.conversion.fuse import fuse
from glf_fast.conversion.padded import Padded
from glf_fast.conversion.reading import read_flow


@dataclass
class Library:
    """How to call a library's flow: `log_prob(flow, x, context)`, and `inverse(flow, z, context)` from N(0, I) noise of the
    data's shape.

    `object`: what the conversion knows of the library. `tolerance`: of values in float64, where it keeps constants in float32.
    `rounded(flow)`: what its log_prob misses of these in float64, too.
    """

    object: object
    log_prob: Callable[[Any, Tensor, Tensor | None], Tensor]
    inverse: Callable[[Any, Tensor, Tensor | None], Tensor] | None
    tolerance: float = 1e-9
    rounded: Callable[[Any], float] = lambda flow: 0.0


Shape = tuple[int, ...]


def dropping(flow: nn.Module, name: str) -> nn.Module:
    """The flow with its modules of a class given a subclass that drops inputs in training mode alone."""
    modules = [module for module in flow.modules() if type(module).__name__ == name]
    assert modules
    for module in modules:
        kind = type(module)
        forward = lambda self, x, *args, kind=kind, **options: kind.forward(  # noqa: E731
            self, nn.functional.dropout(x, 0.5, self.training), *args, **options
        )
        module.__class__ = type("Dropping", (kind,), {"forward": forward})
    return flow


def shake(flow: nn.Module, std: float = 0.15) -> nn.Module:
    """Random weights: fresh ones are too small, or zero, to tell a wrong formula. Fixed ones stay."""
    with torch.no_grad():
        for parameter in flow.parameters():
            if parameter.requires_grad:
                parameter.add_(std * torch.randn_like(parameter))
    return flow


def prove(
    library: Library, flow: nn.Module, shape: int | Shape, context: int | Shape = (), outline: str | None = None
) -> Flow:
    """`convert(flow)` is `flow` in all that one can do with it; returns it in the flow's dtype.

    shape, context: of one sample, (D,) or D or (C, H, W), and of its context, () or 0 for none.
    outline: what comes out, see `outline_of`; not asked if None.
    """
    shape, context_shape = as_shape(shape), as_shape(context)
    images = len(shape) == 3
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    converted = convert(flow)
    for name, value in flow.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} of the original has changed"
    parameter = next(flow.parameters())
    assert {p.dtype for p in converted.parameters()} == {parameter.dtype}
    assert converted.training == flow.training
    assert converted.event_shape == shape and converted.context_shape == context_shape
    assert outline is None or outline_of(converted) == outline, outline_of(converted)

    exact = copy.deepcopy(flow).double()
    x, given = draw(6 if images else 32, shape, context_shape, torch.float64)
    same_map(library, exact if images else exact.eval(), x, given)
    ours, theirs = float32_errors(library, flow, shape, context_shape, converted)
    # The same sums in another order: with two columns the medians differ by up to a fifth either way, and all of an error
    # may be in the last digit of log_prob. All flows of a library together are compared without these allowances.
    last_digit = torch.finfo(torch.float32).eps * library.log_prob(exact, x, given).abs().median().item()
    assert ours <= max(1.25 * theirs, last_digit), f"float32 errors: ours {ours:.3g}, the library's {theirs:.3g}"

    saved_and_copied(converted, *draw(3, shape, context_shape))
    if not images and shape[0] % 2 and (kind := kind_of(converted)) not in _COMPILED:  # seconds each
        compiles(converted, *draw(5, shape, context_shape))
        _COMPILED.add(kind)
    trains(copy.deepcopy(converted), *draw(32 if images else 256, shape, context_shape))
    return converted


def as_shape(shape: int | Shape) -> Shape:
    """(D,) of D, () of 0."""
    return ((shape,) if shape else ()) if isinstance(shape, int) else shape


def draw(
    n: int, shape: Shape, context_shape: Shape, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor | None]:
    """n samples and their contexts."""
    return torch.randn(n, *shape, dtype=dtype), torch.randn(n, *context_shape, dtype=dtype) if context_shape else None


def outline_of(flow: nn.Module) -> str:
    """The steps of each CouplingFlow, of each AutoregressiveFlow behind an "a", and the classes of layers that are kept.

    Data → noise: "3 KeptTransform a2".
    """
    found = []
    for name, module in flow.named_modules():
        if isinstance(module, CouplingFlow):
            found.append(str(module.config["steps"]))
        elif isinstance(module, AutoregressiveFlow):
            found.append(f"a{module.config['steps']}")
        elif re.fullmatch(r"(flow\.)?layers\.\d+", name) and not type(module).__module__.startswith("glf_fast.flow"):
            found += [type(module).__name__] * (not isinstance(module, Padded))
    return " ".join(found)


def same_map(library: Library, flow: nn.Module, x: Tensor, context: Tensor | None) -> None:
    """In float64: density, its gradients with respect to x and to every parameter of the library's flow, samples."""
    reading = read_flow(library.object, flow)
    if reading.embedding is None:
        fused, sources = fuse(reading.layers, reading.event_shape, reading.context_shape)
    else:
        fused, sources = _converted(type(flow).__name__, flow, reading)
    fused.eval()
    near = {"rtol": library.tolerance, "atol": library.tolerance}
    x.requires_grad_()
    log_p, log_q = library.log_prob(flow, x, context), fused.log_prob(x, context)
    torch.testing.assert_close(log_q, log_p, **near)

    parameters = [p for p in flow.parameters() if p.requires_grad]
    weight = torch.randn(len(x), dtype=x.dtype)
    wanted_x, *wanted = torch.autograd.grad(weight @ log_p, [x, *parameters], retain_graph=True, allow_unused=True)
    sources = [(p, value) for p, value, _ in sources if p.requires_grad]
    got_x, *direct = torch.autograd.grad(weight @ log_q, [x, *(p for p, _ in sources), *parameters], allow_unused=True)
    stacked = [(v, g) for (_, v), g in zip(sources, direct, strict=False) if v.requires_grad and g is not None]
    back: tuple[Tensor | None, ...] = (None,) * len(parameters)
    if stacked and parameters:
        values, gradients = zip(*stacked, strict=True)
        back = torch.autograd.grad(values, parameters, gradients, retain_graph=True, allow_unused=True)
    close_to(got_x, wanted_x, 10 * library.tolerance)
    for p, through, kept, truth in zip(parameters, back, direct[len(sources) :], wanted, strict=True):
        got = sum((g for g in (through, kept) if g is not None), torch.zeros_like(p))
        close_to(got, torch.zeros_like(p) if truth is None else truth, 10 * library.tolerance)

    z = torch.randn_like(x)
    loose = {"rtol": 1e-7, "atol": 1e-7}
    if library.inverse is not None:
        inverse = library.inverse(flow, z.clone(), context)
        tolerance = max(1e-7, library.tolerance)
        torch.testing.assert_close(fused.inverse(z, context)[0], inverse, rtol=tolerance, atol=tolerance)
    z, logdet = fused(x, context)
    back_x, back_logdet = fused.inverse(z, context)
    torch.testing.assert_close(back_x, x, **loose)
    torch.testing.assert_close(back_logdet, -logdet, **loose)
    one = None if context is None else context[:1]
    jacobian = torch.autograd.functional.jacobian(lambda a: fused(a[None], one)[0][0].flatten(), x[0].detach())
    logabsdet = torch.linalg.slogdet(jacobian.flatten(1))[1]
    torch.testing.assert_close(logabsdet, fused(x[:1], one)[1][0].detach(), **loose)
    if x.ndim == 4:
        channels_last = x.detach().to(memory_format=torch.channels_last)
        torch.testing.assert_close(fused.log_prob(channels_last, context), log_q, rtol=1e-9, atol=1e-9)


def close_to(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    """To the tolerance of the larger of 1 and the largest entry."""
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance * max(1.0, wanted.abs().max().item()))


@torch.no_grad()
def float32_errors(
    library: Library, flow: nn.Module, shape: Shape, context_shape: Shape = (), converted: Flow | None = None
) -> tuple[float, float]:
    """How far log_prob in float32 is from float64's, ours and the library's: medians over many samples.

    Of medians, because in flows as steep as these a few samples carry all of the mean square.
    """
    x, context = draw(4096 if len(shape) == 1 else 300, shape, context_shape)
    exact = copy.deepcopy(flow).double()
    truth = library.log_prob(exact, x.double(), None if context is None else context.double()) + library.rounded(exact)
    ours = (converted or convert(flow)).log_prob(x, context)
    return tuple((q - truth).abs().median().item() for q in (ours, library.log_prob(flow, x, context)))


@torch.no_grad()
def as_close_as_the_library(
    library: Library, flows: Iterable[nn.Module], shape: Shape, context_shape: Shape = (), most: float = 1.0
) -> None:
    """In float32, accelerated. One ratio of two rounding errors scatters by 17 %, the mean over all flows hardly."""
    ratios = []
    for flow in flows:
        exact, fast = copy.deepcopy(flow).double(), copy.deepcopy(flow)
        assert accelerate(fast)
        x, context = draw(4096 if len(shape) == 1 else 300, shape, context_shape)
        wanted = library.log_prob(exact, x.double(), None if context is None else context.double())
        wanted = wanted + library.rounded(exact)
        ours, theirs = ((library.log_prob(f, x, context) - wanted).abs().mean() for f in (fast, flow))
        ratios.append(float(ours / theirs))
    assert torch.tensor(ratios).log().mean().exp() <= most, ratios


def trained(library: Library, make: Callable[[], nn.Module], x: Tensor, context: Tensor | None = None) -> nn.Module:
    """A flow trained and saved by the library, loaded into a fresh one."""
    flow, loaded = make(), make()
    optimizer = torch.optim.Adam([p for p in flow.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        (-library.log_prob(flow, x, context).mean()).backward()
        optimizer.step()
    file = io.BytesIO()
    torch.save(flow.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file))
    return loaded


def saved_and_copied(flow: Flow, x: Tensor, context: Tensor | None) -> None:
    """Pickles, copies, state_dict into a copy with other values."""
    flow = copy.deepcopy(flow).eval()  # a network may draw, or count, in training mode
    z = flow(x, context)[0]
    file = io.BytesIO()
    torch.save(flow, file)
    file.seek(0)
    other = copy.deepcopy(flow)
    assert torch.equal(other(x, context)[0], z)
    assert torch.equal(torch.load(file, weights_only=False)(x, context)[0], z)
    shake(other)
    assert not torch.equal(other(x, context)[0], z)
    other.load_state_dict(flow.state_dict())
    assert torch.equal(other(x, context)[0], z)


# The kinds of flows that this process has compiled.
_COMPILED: set[frozenset[object]] = set()


def kind_of(flow: Flow) -> frozenset[object]:
    """All that decides which code torch.compile traces: classes of modules, and of couplings the options that branch.

    Other options are numbers that reach an operation as they are, and of all steps and layers each is traced like the first.
    """
    branching = ("coupling", "network", "linear", "actnorm")
    found: set[object] = {type(module) for module in flow.modules()} | {bool(flow.context_shape)}
    for module in flow.modules():
        if isinstance(module, CouplingFlow):
            found.add((*(module.config[name] for name in branching), bool(module.config["context_dim"])))
    return frozenset(found)


def compiles(flow: Flow, x: Tensor, context: Tensor | None) -> None:
    """One graph for torch.compile."""
    torch._dynamo.reset()
    compiled = torch.compile(flow.log_prob, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, context), flow.log_prob(x, context))


def trains(flow: Flow, x: Tensor, context: Tensor | None) -> None:
    """Adam lowers the loss, gradients reach every parameter that is trained, and what is held stays."""
    flow.train()
    held = {name: buffer.clone() for name, buffer in flow.named_buffers() if name.endswith(".value")}
    trained = [p for p in flow.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=3e-3 if x.ndim == 2 else 1e-3)
    losses = []
    for _ in range(6):
        loss = -flow.log_prob(2 * x + 1 if x.ndim == 2 else x + 0.5, context).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    assert all(p.grad is not None for p in trained)
    state = flow.state_dict()
    assert all(torch.equal(state[name], value) for name, value in held.items())
    for module in flow.modules():
        for name, part in getattr(module, "held", {}).items():
            path, _, index = name.rpartition("_")
            p = getattr(module, path)[int(index)] if index.isdigit() else getattr(module, name)
            assert p.grad is None or not p.grad[part.trained == 0].any(), f"{name}: a gradient where nothing is trained"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def conv_net(n_in: int, n_out: int) -> nn.Module:
    """3 × 3, so that a pixel sees its neighbours."""
    return nn.Sequential(nn.Conv2d(n_in, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, n_out, 3, padding=1))


def accelerated(flow: nn.Module) -> tuple[nn.Module, nn.Module, Any]:
    """The flow, changed; a copy of what it was in float64; the report."""
    original = copy.deepcopy(flow).double()
    networks = {id(m) for m in flow.modules() if isinstance(m, nn.Conv2d)}
    report = accelerate(flow)
    assert {id(m) for m in flow.modules() if isinstance(m, nn.Conv2d)} == networks, "networks are the originals"
    return flow, original, report


@pytest.fixture(name="tools")
def _tools() -> SimpleNamespace:
    """The functions of this file, for tests."""
    return SimpleNamespace(
        Library=Library, dropping=dropping, prove=prove, shake=shake, same_map=same_map, trained=trained,
        as_close=as_close_as_the_library,
        conv_net=conv_net, accelerated=accelerated, shake_images=partial(shake, std=0.05),
    )  # fmt: skip
