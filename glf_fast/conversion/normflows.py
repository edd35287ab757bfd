"""normflows. A layer's `forward` is noise → data and its list of layers starts at the noise; here both are turned around."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from glf_fast.conversion import mlp
from glf_fast.conversion.chains import Chain, Part, Shape, module_list, replaced
from glf_fast.conversion.couplings import DeclaredCoupling
from glf_fast.conversion.layers import (
    EXP,
    Bijection,
    Conditioner,
    ConversionError,
    Coupling,
    Dense,
    Diagonal,
    Kept,
    Layer,
    Permutation,
    Scale,
    Unfusable,
    check_started,
    trained_together,
)
from glf_fast.conversion.library import Base, FusedLayer, Library, Reader, Unpacked
from glf_fast.conversion.mlp import (
    read_bounded_mlp,
    read_mlp,
    select_inputs,
    select_outputs,
    separate,
    without_shift,
)
from glf_fast.conversion.nflows_layers import affine_autoregressive, columns_of, spline_autoregressive, spline_coupling
from glf_fast.flow import Split

__all__ = ["LIBRARY"]


class KeptLayer(Bijection):
    """A normflows layer with its directions exchanged: forward is data → noise."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.layer = part.module

    def _run(self, x: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
        direction = self.layer.forward if inverse else self.layer.inverse
        takes_context = "context" in inspect.signature(direction).parameters
        y, logdet = direction(x, context=context) if takes_context else direction(x)
        return y, logdet + x.new_zeros(len(x))  # some return one number for the whole batch


class NormflowsLayer(FusedLayer):
    """A flow: `forward` is noise → data."""

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise → data: z (B, *shape) → x like z, logdet (B,)."""
        return super().inverse(z, context)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → noise: x (B, *shape) → z like x, logdet (B,)."""
        return super().forward(x, context)


def _const_scale(module: Any) -> Iterator[mlp.Step]:
    yield mlp.Times(float(module.scale))


mlp.KNOWN["normflows.utils.nn.ConstScaleLayer"] = _const_scale


# -- one function per class --------------------------------------------------------------------------------------------


def _affine_coupling_block(part: Part) -> list[Layer]:
    split, coupling, _ = part.module.flows
    dim = part.shape[0]
    columns = torch.arange(dim, device=next(part.module.parameters()).device)
    passive, transformed = columns[: dim - dim // 2], columns[dim - dim // 2 :]
    if split.mode.startswith("checkerboard") and len(part.shape) == 1 and dim % 2 == 0:
        passive, transformed = columns[1::2], columns[0::2]
    elif not split.mode.startswith("channel"):
        what = "channels" if len(part.shape) == 3 else f"{dim} columns"
        raise Unfusable(f"split_mode {split.mode!r} does not split {what}")
    if split.mode.endswith("_inv"):
        passive, transformed = transformed, passive
    _check_started(coupling.param_map)
    declared = partial(DeclaredCoupling, passive, transformed, coupling.param_map, context="none")
    if not coupling.scale:
        return [declared("t", undo=True).read(part)]
    if coupling.scale_map not in _SCALE_MAPS:
        raise Unfusable(f"scale_map {coupling.scale_map!r} is not covered")
    scale, undo = _SCALE_MAPS[coupling.scale_map]
    factor_t = 1.0 if undo else -1.0  # (v − t)·e^f(u) adds first
    return [declared("tutu", scale, factor_t=factor_t, add_first=not undo, undo=undo).read(part)]


# scale_map → log-scale, and whether data → noise is (v − t)·e^−f(u) and not (v − t)·e^f(u).
_SCALE_MAPS = {
    "exp": (EXP, True),
    "sigmoid": (Scale("glow", 2.0), False),
    "sigmoid_inv": (Scale("glow", 2.0), True),
}


def _masked_affine_flow(part: Part) -> list[Layer]:
    """Its networks take and make all columns, of which only the passive ones count on one side, the others on the other."""
    module, (dim,) = part.module, part.shape
    mask = module.b.flatten()
    if len(mask) != dim or not bool(((mask == 0) | (mask == 1)).all()):
        raise Unfusable("its mask is not one 0 or 1 per column")
    passive, transformed = mask.nonzero().flatten(), (mask == 0).nonzero().flatten()

    def read(network: Any) -> tuple[Conditioner | None, float | None]:
        if network is torch.zeros_like:
            return None, None
        full, bound = read_bounded_mlp(network)
        if (full.n_in, full.n_out) != (dim, dim):
            raise Unfusable(f"its network maps {full.n_in} columns to {full.n_out} where {dim} to {dim} are meant")
        return select_outputs(select_inputs(full, passive), transformed), bound

    (net_s, bound), (net_t, bound_t) = read(module.s), read(module.t)
    if bound_t is not None:
        raise Unfusable("its shift is bounded by tanh; log-scales may be")
    if not len(transformed) or (net_s is None and net_t is None):
        return []
    if not len(passive):
        raise Unfusable("its mask leaves no column to condition on")
    if net_s is not None:
        net_t = without_shift(net_s) if net_t is None else separate(net_s, net_t)
    assert net_t is not None
    return [Coupling(passive, transformed, net_t, EXP if bound is None else Scale("tanh", bound), undo=True)]


def _affine_const_flow(part: Part) -> list[Layer]:
    module = part.module
    if tuple(module.s.shape) != (1, part.shape[0], *[1] * (len(part.shape) - 1)):
        raise Unfusable(f"its shape {tuple(module.s.shape[1:])} is not one number for each of {part.shape[0]} channels")
    _check_started(module)
    s, t = module.s.view(-1), module.t.view(-1)
    return [Diagonal(-s, -t * torch.exp(-s), trained_together(module.s, module.t))]


def _permute(part: Part) -> list[Layer]:
    module, dim = part.module, part.shape[0]
    if module.num_channels != dim:
        raise Unfusable(f"it permutes {module.num_channels} columns of {dim}")
    if module.mode == "shuffle":
        return [Permutation(module.inv_perm)]
    return [Permutation(torch.arange(dim).roll(-((dim + 1) // 2)))]


def _lu_linear_permute(part: Part) -> list[Layer]:
    linear = part.module.linear
    trained = trained_together(*linear.parameters())
    dense = Dense(linear.weight().T, linear.bias.view(-1), trained, regular=True)  # x Wᵀ + bias
    return [Permutation(part.module.permutation._permutation), dense]


def _invertible_matrix(part: Part) -> list[Layer]:
    """`InvertibleAffine` multiplies rows, `Invertible1x1Conv` columns."""
    module = part.module
    W = module._assemble_W() if module.use_lu else module.W
    W = W.T if len(part.shape) == 3 else W
    return [Dense(W, W.new_zeros(len(W)), trained_together(*module.parameters()), regular=module.use_lu)]


def _check_started(module: nn.Module) -> None:
    """Raise ConversionError for an ActNorm, `module` or in it, that has not seen a batch."""
    check_started(all(bool(getattr(part, "data_dep_init_done", True)) for part in module.modules()))


class NormalBase(Bijection):
    """A normal base of images, with a mean and a scale for every pixel or channel, as the map (x − μ)/σ to N(0, I)."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base

    def _run(self, x: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
        mean, log_scale = self._moments()
        y = mean + log_scale.exp() * x if inverse else (x - mean) * torch.exp(-log_scale)
        logdet = (log_scale if inverse else -log_scale).expand(len(x), *x.shape[1:])
        return y, logdet.flatten(1).sum(1)

    def is_identity(self) -> bool:
        """True if it is N(0, I), and is not trained."""
        trained = any(p.requires_grad for p in self.base.parameters())
        return not (trained or any(bool(moment.any()) for moment in self._moments()))

    def _moments(self) -> tuple[Tensor, Tensor]:
        base: Any = self.base
        if type(base).__name__ == "DiagGaussian":
            return base.loc, base.log_scale
        factor = base.logscale_factor
        return base.loc * torch.exp(factor * base.loc_logs), base.log_scale * torch.exp(factor * base.log_scale_logs)


def _chains(flow: Any) -> list[Chain]:
    """`flow.flows`; of a multi-scale flow one for every level."""
    if isinstance(flow.q0, nn.ModuleList):
        return _levels(flow)
    shape = tuple(getattr(flow.q0, "shape", ()))
    named = list(_named(flow.flows, "flows"))
    if len(shape) != 3:  # a base need not know its shape, and layers: where none does, there is none that could be read
        columns = (_columns_of(module) for _, module in named)
        shape = shape or (next((n for n in columns if n is not None), 0),)
    return [_chain(named, shape, partial(setattr, flow, "flows"), flow.flows)]


def _levels(flow: Any) -> list[Chain]:
    """A merge after each level but the last takes in the noise of the next one."""
    chains: list[Chain] = []
    shape: Shape = tuple(flow.q0[0].shape)
    for i, level in enumerate(flow.flows):
        if i:
            C, H, W = flow.q0[i].shape
            mode = getattr(flow.merges[i - 1], "mode", None)
            if mode not in ("channel", "channel_inv"):
                kind = type(flow.merges[i - 1]).__name__
                raise ConversionError(f"merges.{i - 1} ({kind}): mode {mode!r} does not join channels")
            shape = (shape[0] + C, H, W)
        named = list(_named(level, f"flows.{i}"))
        chains.append(_chain(named, shape, partial(setattr, flow.flows, str(i)), level))
        shape = chains[-1].parts[0].shape if named else shape
    return chains[::-1]


def _named(layers: nn.ModuleList, prefix: str) -> list[tuple[str, nn.Module]]:
    """Data → noise."""
    named = [pair for i, layer in enumerate(layers) for pair in LIBRARY.flattened(layer, f"{prefix}.{i}")]
    return named[::-1]


def _chain(
    named: list[tuple[str, nn.Module]], noise: Shape, put: Callable[[nn.ModuleList], None], layers: nn.ModuleList
) -> Chain:
    """`put` takes the list that comes in place of `layers`."""
    parts = LIBRARY.placed(named, noise)
    own = {module for layer in layers for module in (layer, getattr(layer, "layer", None))}
    modules = [part.module if part.module in own else Unpacked(part.module) for part in parts]
    return Chain(parts, lambda new: put(module_list(reversed(replaced(modules, new)), layers)))


def _base(flow: Any) -> Base:
    """A DiagGaussian on vectors or images, or on images a GlowBase without classes; of several levels, each of them."""
    if isinstance(flow.q0, nn.ModuleList):
        return _bases(flow)
    _check_base("q0", flow.q0)
    base = flow.q0
    if len(base.shape) == 1:
        return Base.normal("q0 (DiagGaussian)", base.loc[0], base.log_scale[0], base.loc, base.log_scale)
    return Base(tuple(base.shape), _standardised("q0", base), lambda z: NormalBase(base).inverse(z)[0])


def _check_base(where: str, base: Any) -> None:
    name = type(base).__name__
    if name not in ("DiagGaussian", "GlowBase") or getattr(base, "class_cond", False):
        raise ConversionError(f"{where} ({name}): the base must be a DiagGaussian, or a GlowBase without classes")
    if base.temperature is not None:
        raise ConversionError(f"{where} ({name}): temperature is {base.temperature}; set it to None")


def _standardised(where: str, base: Any, kind: Callable[[Any], Bijection] = NormalBase) -> list[Layer]:
    """The map of a base to N(0, I)."""
    return [] if NormalBase(base).is_identity() else [Kept(kind(base), f"{where} stays")]


def _bases(flow: Any) -> Base:
    if flow.transform is not None:
        raise ConversionError(f"transform ({type(flow.transform).__name__}): only flows without one are converted")
    between: list[list[Layer]] = []
    for i, base in reversed(list(enumerate(flow.q0))):
        _check_base(f"q0.{i}", base)
        if i:
            C = 2 * base.shape[0]
            split = Kept(Split(C, learned=False), f"merges.{i - 1} stays")
            # "channel_inv" factors out the first half of the channels; a `Split` takes the last.
            inverted = flow.merges[i - 1].mode == "channel_inv"
            halves: list[Layer] = [Permutation(torch.arange(C).roll(C // 2))] if inverted else []
            between.append([*halves, *_standardised(f"q0.{i}", base, FactoredOut), split])
    return Base(LIBRARY.chains(flow)[0].parts[0].shape, _standardised("q0.0", flow.q0[0]), between=tuple(between))


class FactoredOut(Bijection):
    """[p, v] → [p, (v − μ)/σ] of halves of the channels, with the base of what is factored out behind it."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.normal = NormalBase(base)

    def _run(self, x: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
        p, v = x.chunk(2, 1)
        v, logdet = self.normal.inverse(v) if inverse else self.normal(v)
        return torch.cat([p, v], 1), logdet


def _generate(flow: Any, noise: Tensor, context: Tensor | None) -> Tensor:
    if not isinstance(flow.q0, nn.ModuleList):
        return flow.forward(noise, *_given(flow, context))
    bases: list[Any] = list(flow.q0)
    pieces = noise.flatten(1).split([math.prod(base.shape) for base in reversed(bases)], 1)
    latents = [NormalBase(q0).inverse(z.view(-1, *q0.shape))[0] for q0, z in zip(bases, pieces[::-1], strict=True)]
    return flow.forward_and_log_det(latents)[0]


def _given(flow: Any, context: Tensor | None) -> list[Tensor | None]:
    """The context, for a flow that takes one; no classes, for one that takes these."""
    if isinstance(flow.q0, nn.ModuleList):
        return [None]
    return [context] if any(kind.__name__ == "ConditionalNormalizingFlow" for kind in type(flow).__mro__) else []


def _columns_of(module: Any) -> int | None:
    """How many columns a layer works on, where it says so: normflows' flows do not."""
    kind = type(module).__name__
    if kind in ("ActNorm", "AffineConstFlow", "MaskedAffineFlow"):
        values = module.b if kind == "MaskedAffineFlow" else module.s
        return values.shape[1] if values.ndim == 2 else None
    if kind in ("InvertibleAffine", "Permute"):
        return module.num_channels
    if kind == "LULinearPermute":
        return module.linear.features
    if kind == "AffineCouplingBlock":
        with suppress(Unfusable):
            net = read_mlp(module.flows[1].param_map)
            return net.n_in + (net.n_out // 2 if module.flows[1].scale else net.n_out)
    return columns_of(getattr(module, "prqct", getattr(module, "mprqat", module)))


_ON_BOTH: dict[str, Reader] = {
    "ActNorm": _affine_const_flow,
    "AffineConstFlow": _affine_const_flow,
    "AffineCouplingBlock": _affine_coupling_block,
    "Permute": _permute,
}
LIBRARY: Library = Library(
    package="normflows",
    flows=("NormalizingFlow", "ConditionalNormalizingFlow", "MultiscaleFlow"),
    hosts=("ClassCondFlow", "NormalizingFlowVAE"),
    packages=("normflows.core", "normflows.flows"),
    marks=("flows", "q0"),
    chains=_chains,
    base=_base,
    log_prob=lambda flow, x, context: flow.log_prob(x, *_given(flow, context)),
    generate=_generate,
    kept=KeptLayer,
    fused=lambda fused, parts: NormflowsLayer(fused),
    on_vectors={
        **_ON_BOTH,
        "InvertibleAffine": _invertible_matrix,
        "CoupledRationalQuadraticSpline": lambda part: spline_coupling(part, part.module.prqct),
        "LULinearPermute": _lu_linear_permute,
        "AutoregressiveRationalQuadraticSpline": lambda part: spline_autoregressive(part, part.module.mprqat),
        "CircularAutoregressiveRationalQuadraticSpline": lambda part: spline_autoregressive(part, part.module.mprqat),
        "MaskedAffineAutoregressive": partial(affine_autoregressive, undo=True),
        "MaskedAffineFlow": _masked_affine_flow,
    },
    on_images={**_ON_BOTH, "Invertible1x1Conv": _invertible_matrix},
    squeezes={"Squeeze": lambda module: 2},
    compositions={"Composite": "_flows", "GlowBlock": "flows"},
    refused={
        **dict.fromkeys(("Split", "Merge", "AffineCoupling"), "works on lists; use an AffineCouplingBlock"),
        "BatchNorm": "it normalises with each batch's own statistics and has no inverse",
        **dict.fromkeys(
            ("Residual", "MetropolisHastings", "HamiltonianMonteCarlo"), "its log-determinant is a random estimate"
        ),
    },
)
