"""Layers whose backward rebuilds their inputs from their outputs, so that the activations of one layer are kept, not of all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from glf_fast import ops
from glf_fast.flow.actnorm import ActNorm
from glf_fast.flow.coupling import Coupling
from glf_fast.flow.folding import InOrder, Product
from glf_fast.flow.glow_network import GlowNetwork
from glf_fast.flow.moments import not_traced

__all__ = ["check_reversible", "run_reversible"]

Step = Any  # an entry of `folded`: a layer, a Product or an InOrder
Maps = tuple[Tensor, Tensor]  # A and c of a Product
RandomState = tuple[Tensor, Tensor | None]  # of the processor, and of the GPU where x is


def check_reversible(layers: nn.Module) -> None:
    """Raise ValueError if a layer gives something else when it runs a second time on the same input."""
    for name, module in layers.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or getattr(module, "track_running_stats", False):
            raise ValueError(
                f"reversible=True runs each network twice a step, and the {type(module).__name__} in layers.{name} would "
                "update its running statistics twice; use an ActNorm or a GroupNorm there, or reversible=False"
            )
        if isinstance(module, _SpectralNorm) or any(
            isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values()
        ):
            raise ValueError(
                f"reversible=True runs each network twice a step, and the spectral norm in layers.{name} would take another "
                "step of its power iteration and give other weights; use reversible=False"
            )


def run_reversible(
    steps: Sequence[Step], maps: Sequence[Maps | None], x: Tensor, context: Tensor | None, *, inverse: bool
) -> tuple[Tensor, Tensor]:
    """x through the steps, in the order given, and the sum (B,) of their log-determinants without those of the products.

    What `inverse` undoes is given last step first. Nothing is kept for the backward but the output, the matrices of the
    products and the state of the random numbers at each coupling.

    Args:
        steps: layers, or what `folded` makes of them, that keep the shape of x.
        maps: A, or A⁻¹ if `inverse`, and c of each product; None for all other steps.
    """
    flat = [tensor for pair in maps if pair is not None for tensor in pair]
    # Each of them once, however many steps share it: its gradient is that of all of them together.
    parameters = list(dict.fromkeys(p for step in steps for p in _module(step).parameters()))
    return _run(steps, [pair is not None for pair in maps], inverse, x, context, flat, parameters)


@not_traced
def _run(
    steps: Sequence[Step],
    is_product: list[bool],
    inverse: bool,
    x: Tensor,
    context: Tensor | None,
    flat: list[Tensor],
    parameters: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    return _Reversible.apply(_Plan(steps, is_product, inverse, len(flat)), x, context, *flat, *parameters)


class _Plan:
    """Everything about a run that is no tensor, and what its forward remembers for its backward."""

    def __init__(self, steps: Sequence[Step], is_product: list[bool], inverse: bool, matrices: int) -> None:
        self.steps, self.is_product, self.inverse, self.matrices = steps, is_product, inverse, matrices
        self.random: list[RandomState | None] = []  # before each step
        self.modes = [(module, module.training) for step in steps for module in _module(step).modules()]
        self.state = self.present_state()
        self.autocast: tuple[bool, torch.dtype] = (False, torch.bfloat16)

    def present_state(self) -> list[Tensor]:
        """The parameters and buffers that the steps have now."""
        modules = [_module(step) for step in self.steps]
        return [t for module in modules for t in (*module.parameters(), *module.buffers())]

    @contextlib.contextmanager
    def as_in_forward(self) -> Iterator[None]:
        """Inside the block, modules are in training or evaluation mode as they were in the forward, and no ActNorm starts.

        Raises RuntimeError where gradients would be wrong: modules have other tensors as parameters or buffers now, or change
        them when they run.
        """
        present = self.present_state()
        if len(present) != len(self.state) or any(a is not b for a, b in zip(present, self.state, strict=True)):
            raise RuntimeError(
                "the backward of a reversible=True flow runs its networks again, but their parameters or buffers are other "
                "tensors now than in the forward (as after torch.func.functional_call); use reversible=False"
            )
        versions = [t._version for t in self.state]
        now = [(module, module.training) for module, _ in self.modes]
        try:
            # Not by train(), which may do more than that in modules of one's own. An ActNorm that was undone has no start yet.
            for module, mode in self.modes:
                module.training = mode and not isinstance(module, ActNorm)
            yield
        finally:
            for module, mode in now:
                module.training = mode
        if versions != [t._version for t in self.state]:
            raise RuntimeError(
                "a network of a reversible=True flow changes its own parameters or buffers when it runs, so that it gave "
                "something else in the backward than in the forward; use reversible=False"
            )

    def pairs(self, flat: Sequence[Tensor]) -> list[Maps | None]:
        """A and c of each step, from the list of them all."""
        pair = iter(zip(flat[::2], flat[1::2], strict=True))
        return [next(pair) if product else None for product in self.is_product]


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, x: Tensor, context: Tensor | None, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        device = x.device.type
        plan.autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        logdet = x.new_zeros(len(x), dtype=torch.promote_types(x.dtype, torch.float32))
        for step, pair in zip(plan.steps, plan.pairs(tensors[: plan.matrices]), strict=True):
            plan.random.append(_random_state(step, x.device))
            if pair is not None:
                x = ops.channel_map(x, *pair, inverse=plan.inverse)
                continue
            x, ldj = _apply(step, x, context, inverse=plan.inverse)
            logdet = logdet + ldj
        ctx.plan, ctx.parameters = plan, tensors[plan.matrices :]
        # Modules keep their parameters and buffers, so that saving them costs nothing: autograd then refuses a backward after
        # a change in place, as for a flow that is not reversible.
        ctx.save_for_backward(x, context, *tensors[: plan.matrices], *plan.state)
        return x, logdet

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_logdet: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        x, context, *saved = ctx.saved_tensors
        flat = saved[: plan.matrices]
        pairs, back = plan.pairs(flat), _inverses(flat[::2])
        sums: dict[Tensor, Tensor] = {}  # gradients of parameters, which steps may share
        of_context: Tensor | None = None
        of_maps: list[Tensor] = []
        enabled, dtype = plan.autocast
        with plan.as_in_forward(), torch.autocast(x.device.type, dtype, enabled=enabled):
            for step, pair, random in zip(plan.steps[::-1], pairs[::-1], plan.random[::-1], strict=True):
                if pair is not None:
                    x = ops.channel_map(x, back.pop(), pair[1], inverse=not plan.inverse)
                    grad, *of_map = _product_gradients(x, pair, grad, inverse=plan.inverse)
                    of_maps[:0] = of_map
                    continue
                x, grad, found = _step_back(step, x, context, random, grad, grad_logdet, sums, inverse=plan.inverse)
                if found is not None:
                    of_context = found if of_context is None else of_context + found
        return None, grad, of_context, *of_maps, *(sums.get(p) for p in ctx.parameters)


def _step_back(
    step: Step,
    z: Tensor,
    context: Tensor | None,
    random: RandomState | None,
    grad: Tensor,
    grad_logdet: Tensor,
    sums: dict[Tensor, Tensor],
    *,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The input of a step of output z, and the gradients of input and context; those of parameters are added to `sums`."""
    parameters = [p for p in _module(step).parameters() if p.requires_grad]
    if context is not None and context.requires_grad:
        context = context.detach().requires_grad_()
    coupling = step.coupling if isinstance(step, InOrder) else step
    if isinstance(coupling, Coupling) and (coupling.order is None or step is not coupling):
        # The conditioner runs once: of p, which is the same before and behind the coupling.
        parts = coupling.parts(z)
        p, w = parts.divide(z)
        p, inverse = p.detach().requires_grad_(), inverse != coupling.undo
        with torch.enable_grad(), _restored(random, z.device):
            raw = coupling.conditioned(p, context, parts.outputs)
        detached = tuple(r if r is None else r.detach() for r in raw) if isinstance(raw, tuple) else raw.detach()
        v = coupling.transform(w, detached, parts, inverse=not inverse)[0].requires_grad_()
        with torch.enable_grad():
            w, logdet = coupling.transform(v, raw, parts, inverse=inverse)
        of_p, of_w = parts.divide(grad)
        found = _gradients((w, logdet), (of_w, grad_logdet), (p, v), context, parameters, sums)
        return parts.join(p.detach(), v.detach()), parts.join(of_p + found[0], found[1]), found[2]
    with _restored(random, z.device):
        x = _apply(step, z, context, inverse=not inverse)[0].requires_grad_()
    with torch.enable_grad(), _restored(random, z.device):
        outputs = _apply(step, x, context, inverse=inverse)
    of_x, of_context = _gradients(outputs, (grad, grad_logdet), (x,), context, parameters, sums)
    assert of_x is not None
    return x.detach(), of_x, of_context


def _gradients(
    outputs: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor],
    inputs: tuple[Tensor, ...],
    context: Tensor | None,
    parameters: Sequence[Tensor],
    sums: dict[Tensor, Tensor],
) -> list[Any]:
    """Gradients of the inputs, and that of the context or None; those of parameters are added to `sums`."""
    of = [(output, gradient) for output, gradient in zip(outputs, gradients, strict=True) if output.requires_grad]
    given = () if context is None or not context.requires_grad else (context,)
    found = torch.autograd.grad(
        [output for output, _ in of],
        (*inputs, *given, *parameters),
        [gradient for _, gradient in of],
        materialize_grads=True,
    )
    for parameter, gradient in zip(parameters, found[len(inputs) + len(given) :], strict=True):
        sums[parameter] = sums[parameter] + gradient if parameter in sums else gradient
    return [*found[: len(inputs)], found[len(inputs)] if given else None]


def _product_gradients(x: Tensor, pair: Maps, grad: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, A and c where y = x A + c, or if `inverse` y = (x − c) A."""
    A, c = pair
    with torch.autocast(x.device.type, enabled=False):
        of_x = ops.channel_map(grad, A.mT, torch.zeros_like(c))
        if inverse:
            x = x - c.view(-1, *(1,) * (x.ndim - 2))
        rows, of_rows = (t.movedim(1, -1).reshape(-1, t.shape[1]) for t in (x, grad))
        of_c = -of_x.transpose(0, 1).flatten(1).sum(1) if inverse else of_rows.sum(0)
        return of_x, rows.mT @ of_rows, of_c


def _inverses(matrices: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of each matrix; those of one size are inverted together."""
    found: dict[int, Tensor] = {}
    for dim in {len(A) for A in matrices}:
        places = [i for i, A in enumerate(matrices) if len(A) == dim]
        found |= zip(places, ops.slogdet_inverse(torch.stack([matrices[i] for i in places]))[2].unbind(), strict=True)
    return [found[i] for i in range(len(matrices))]


def _apply(step: Step, x: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
    return step.inverse(x, context) if inverse else step(x, context)


def _module(step: Step) -> nn.Module:
    """The parameters of a step; those of a product are in its matrices."""
    return nn.Module() if isinstance(step, Product) else step.coupling if isinstance(step, InOrder) else step


def _random_state(step: Step, device: torch.device) -> RandomState | None:
    """The state of the random numbers, where a network may use some, as Dropout does in training, or a function in any mode."""
    module = _module(step)
    if not isinstance(module, Coupling) or type(module.conditioner) is GlowNetwork:
        return None
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextlib.contextmanager
def _restored(state: RandomState | None, device: torch.device) -> Iterator[None]:
    """Inside the block, random numbers continue from this state; afterwards from where they were."""
    if state is None:
        yield
        return
    on_processor, on_gpu = state
    with torch.random.fork_rng(devices=[] if on_gpu is None else [device]):
        torch.set_rng_state(on_processor)
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu, device)
        yield
