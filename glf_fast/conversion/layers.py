"""The layers that a flow of any library is read into: affine maps, couplings, autoregressive layers, and layers that stay.

Readers (one file per library) return a list of these, first to last in the direction data → noise; `fuse` makes
modules of it. All are on vectors x (B, D), row vectors, or on the D channels of images x (B, D, H, W). Tensors keep the
dtype and the device of the flow that was read, and are *not* detached: as functions of the library's parameters they let
autograd take gradients of the converted flow back to the library's parameters, which is how a conversion is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from glf_fast.reference import COUPLINGS, Spline

__all__ = [
    "EXP",
    "FIXED",
    "FROZEN",
    "TRAINED",
    "Autoregressive",
    "Bijection",
    "Conditioner",
    "ConversionError",
    "Coupling",
    "Dense",
    "Diagonal",
    "Entries",
    "Kept",
    "Layer",
    "NamedActivation",
    "Permutation",
    "Piece",
    "Scale",
    "Transform",
    "Unfusable",
    "Univariate",
    "check_once",
    "check_started",
    "flow_options",
    "numbers_of",
    "trained_together",
    "width",
]


# The role of an entry of a network: no parameter at all, as padding is; a parameter that the library does not train now; one
# that it trains. The last two may change places later, the first keeps its value for ever.
FIXED, FROZEN, TRAINED = 0, 1, 2

Degrees = tuple[tuple[int, ...], ...]


class ConversionError(ValueError):
    """A flow that cannot be converted; the message names the layer and the reason."""


class Unfusable(ValueError):
    """A layer that no kernel covers; the message is the reason, in words that a user understands."""


@dataclass(frozen=True)
class Permutation:
    """yᵢ = x_order(i), with `order` (D,) of integers: fixed."""

    order: Tensor


@dataclass(frozen=True)
class Diagonal:
    """y = x·e^log_scale + shift, both (D,): ActNorm, batch norm in evaluation mode, trained normal distributions.

    `trained`: the library trains it (its requires_grad), so that the converted flow must train it, too. `lost` as in
    `Conditioner`.
    """

    log_scale: Tensor
    shift: Tensor
    trained: bool
    lost: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Dense:
    """y = x W + shift with W (D, D) and shift (D,). `regular`: the library's own parametrisation cannot make W
    singular (LU, QR).
    """

    W: Tensor
    shift: Tensor
    trained: bool
    regular: bool


@dataclass(frozen=True)
class NamedActivation:
    """An activation by its name in `glf_fast.reference.ACTIVATION_FUNCTIONS`, and its constant, if it has one."""

    name: str
    constant: float | None = None


class Scale(NamedTuple):
    """v·e^ℓ + t with ℓ = f(u): f by its name in `glf_fast.reference.log_scale`, and its constant, if it has one."""

    log_scale: str
    constant: float | None = None


EXP = Scale("exp")
Univariate = Scale | Spline


def numbers_of(univariate: Univariate) -> int:
    """The number of inputs for each column: u and t, or the parameters of a spline."""
    return univariate.columns if isinstance(univariate, Spline) else 2


def flow_options(univariate: Univariate) -> dict[str, Any]:
    """The arguments of `CouplingFlow` and `AutoregressiveFlow` for it."""
    if isinstance(univariate, Spline):
        return {"spline": univariate, "log_scale": EXP.log_scale}
    return {"log_scale": univariate.log_scale, "log_scale_constant": univariate.constant}


@dataclass(frozen=True)
class Entries:
    """A parameter of a fused network, and the role of each entry, FIXED, FROZEN or TRAINED (uint8)."""

    value: Tensor
    roles: Tensor

    @classmethod
    def of(cls, value: Tensor) -> Entries:
        """A parameter of the library, or a function of parameters that it trains together."""
        return cls(value, torch.full_like(value, TRAINED if value.requires_grad else FROZEN, dtype=torch.uint8))

    @classmethod
    def fixed(cls, value: Tensor) -> Entries:
        """Numbers that are no parameters of the library."""
        return cls(value, torch.full_like(value, FIXED, dtype=torch.uint8))

    @classmethod
    def joined(cls, parts: Sequence[Entries], join: Callable[[list[Tensor]], Tensor]) -> Entries:
        """All of them in one, by torch.cat or torch.stack."""
        return cls(join([part.value for part in parts]), join([part.roles for part in parts]))

    def map(self, change: Callable[[Tensor], Tensor]) -> Entries:
        """A `change` that puts entries elsewhere and adds zeros, which are FIXED, of the value and the roles."""
        return Entries(change(self.value), change(self.roles))


@dataclass(frozen=True)
class Conditioner:
    """An MLP or a residual network: (u, t) of T columns each from P passive columns and C of context.

    Of an MLP, `activation` follows all layers but the last. A residual network of so many `blocks` has its layers in the order
    of `glf_fast.reference.residual`, and gates if it takes a context.

    weights[i] (nᵢ, nᵢ₊₁), biases[i] (nᵢ₊₁) with n₀ = P + C (context last) and n_last = 2T: columns [u | t]; or n_last = T:
    t alone, of an additive coupling; or weights[i] (2, nᵢ, nᵢ₊₁), biases[i] (2, nᵢ₊₁) with n_last = T: a network for u and
    one for t. `factors`, as biases[-1], positive: what the library multiplies u and t by, which stays beside the last layer,
    because in it an optimizer would take other steps; a sign does not matter to optimizers and is in the last layer.
    `dropout`: p, with which `CouplingFlow` drops hidden units in training mode, as the library does; `active`: whether the
    library does so now. `lost`: what else the library does in training mode alone, in words.
    """

    weights: list[Entries]
    biases: list[Entries]
    factors: Tensor
    activation: NamedActivation
    dropout: float = 0.0
    active: bool = False
    lost: frozenset[str] = frozenset()
    blocks: int = 0

    @property
    def network(self) -> str:
        """As in CouplingFlow: "mlp" or "residual"."""
        return "residual" if self.blocks else "mlp"

    @property
    def gated(self) -> bool:
        """A residual network whose blocks have gates."""
        return self.blocks > 0 and len(self.weights) == 2 + 3 * self.blocks

    @property
    def hidden(self) -> list[int]:
        """As in CouplingFlow: widths of the hidden layers, or of the blocks."""
        return [W.value.shape[-1] for W in (self.weights[:1] * self.blocks or self.weights[:-1])]

    @property
    def separate(self) -> bool:
        """Two networks."""
        return self.weights[0].value.ndim == 3

    @property
    def n_in(self) -> int:
        """n₀."""
        return self.weights[0].value.shape[-2]

    @property
    def n_out(self) -> int:
        """The columns that come out, of both networks if there are two."""
        return self.weights[-1].value.shape[-1] * (2 if self.separate else 1)


@dataclass(frozen=True)
class Coupling:
    """v → v·e^ℓ + t, or (v + t)·e^ℓ if `add_first`, with ℓ = f(u), v = x[:, transformed] and p = x[:, passive]; p
    stays.

    `passive` (P,) and `transformed` (T,) hold each of 0 … D−1 once; the output's columns keep the places of the
    input's. `conditioner`: a `Conditioner`, which is stacked with others, or the library's own network on images, `Outputs`.
    `undo`: data → noise is the inverse of that map, as in libraries whose forward is noise → data and whose formula cannot be
    turned around. An additive coupling has EXP, with ℓ = 0. If `univariate` is a `Spline`, v is put through such splines, and
    the conditioner makes the parameters of each side by side. `own_network`: the library's own, which may be faster than the
    conditioner; `gains`: the coupling gains with it, too, as the library multiplies by permutations.
    """

    passive: Tensor
    transformed: Tensor
    conditioner: Any
    univariate: Univariate = EXP
    add_first: bool = False
    undo: bool = False
    own_network: Any = None
    gains: bool = False

    @property
    def is_mlp(self) -> bool:
        """True if the conditioner is an MLP or a residual network, not the library's own."""
        return isinstance(self.conditioner, Conditioner)

    def context_dim(self) -> int:
        """C, columns of the context that the conditioner takes."""
        return self.conditioner.n_in - len(self.passive)

    def kind(self) -> str:
        """As in CouplingFlow: "affine", "separate", "additive" or "spline"."""
        if isinstance(self.univariate, Spline):
            return "spline"
        if self.conditioner.separate:
            return "separate"
        return "additive" if self.conditioner.n_out == len(self.transformed) else "affine"

    def columns(self) -> int:
        """Numbers that one network makes for each transformed column."""
        return (self.univariate if isinstance(self.univariate, Spline) else COUPLINGS[self.kind()]).columns


@dataclass(frozen=True)
class Autoregressive:
    """x_d ↦ T(x_d; θ_d) of all features, whose parameters a masked network makes of the features before and of a context.

    T is the `univariate` one; `undo` as in `Coupling`. The network's layers, in `conditioner`, are those of
    `glf_fast.reference.made`, the context's first: its features have the `order` (D,) of the data's columns, and its units are
    sorted by their `degrees`. Its roles are FIXED also where a mask forbids what the degrees allow.
    """

    order: Tensor
    conditioner: Conditioner
    degrees: Degrees  # of the features, and of the units of each hidden layer
    univariate: Univariate
    context: int  # its columns, C, which all layers have that `AutoregressiveFlow` gives them to
    context_layer: bool  # the last one: the context has a hidden layer of its own
    undo: bool = False
    network: str = "mlp"  # as in AutoregressiveFlow

    is_mlp = True  # as in `Coupling`: it has no network of the library

    @property
    def hidden(self) -> list[int]:
        """As in AutoregressiveFlow: widths of the hidden layers, or of the blocks."""
        widths = [len(layer) for layer in self.degrees[1:]]
        return widths[1::2] if self.conditioner.blocks else widths

    def context_dim(self) -> int:
        """C, columns of the context that the network takes."""
        return self.context


class Bijection(nn.Module):
    """A layer whose subclasses compute both directions in one method, `_run`."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → noise: x (B, …) → z, logdet (B,)."""
        return self._run(x, context, inverse=False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise → data: z (B, …) → x, logdet (B,)."""
        return self._run(z, context, inverse=True)

    def _run(self, x: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


@dataclass(frozen=True)
class Kept:
    """A layer that stays as it is: `module(x, context)` and `module.inverse(z, context)`, data → noise and back,
    return (output, logdet (B,)).

    `module` is an adapter to the library's own layer, in this project's direction; `reason` says why it is not fused.
    """

    module: nn.Module
    reason: str


Piece = Permutation | Diagonal | Dense
Transform = Coupling | Autoregressive
Layer = Piece | Transform | Kept


def width(layer: Piece | Transform) -> int:
    """D, the columns or channels that a layer works on."""
    match layer:
        case Permutation():
            return len(layer.order)
        case Diagonal():
            return len(layer.log_scale)
        case Dense():
            return len(layer.W)
        case Autoregressive():
            return len(layer.order)
    return len(layer.passive) + len(layer.transformed)


def check_started(started: bool) -> None:
    """Raise ConversionError for an ActNorm that has not seen a batch: any call, a comparison's too, would initialise it."""
    if not started:
        raise ConversionError("an ActNorm has not been initialised: send a batch of data through the flow first")


def check_once(name: str, layers: Iterable[Iterable[Tensor | None]]) -> None:
    """Raise Unfusable where two layers have a parameter in common."""
    parameters = [id(t) for layer in layers for t in layer if t is not None]
    if len(set(parameters)) < len(parameters):
        raise Unfusable(f"{name} uses a linear layer more than once: its copies would not stay equal in training")


def trained_together(*parameters: Tensor) -> bool:
    """True if the library trains them, False if not; raises Unfusable if it trains some alone."""
    trained = {p.requires_grad for p in parameters}
    if len(trained) > 1:
        raise Unfusable("only some of its parameters are trained")
    return trained == {True}
