"""The settings of a normalizing flow on codes, which several models have as a table of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from glf_fast.errors import UserError
from glf_fast.flow import AutoregressiveFlow, CouplingFlow, Flow, rnvp_flow
from glf_fast.settings import POSITIVE, Rule, Settings, shown

__all__ = ["FlowSettings"]

# Of a deeper flow nothing would be seen for minutes but that it is being built.
_DEPTH: Rule = (lambda value: 0 < value <= 1000, "between 1 and 1000")


@dataclass(frozen=True)
class FlowSettings(Settings):
    """The normalizing flow."""

    kind: Literal["coupling", "autoregressive", "rnvp"] = "coupling"
    """Kind of flow. coupling: Glow's steps (ActNorm, linear, coupling); autoregressive: the same with masked networks in place
    of couplings (MAF); rnvp: the GLF paper's blocks."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers in the networks; rnvp needs two equal widths."""
    steps: int = 8
    """Not for kind rnvp: number of steps."""
    activation: str = "relu"
    """Not for kind rnvp: activation of the networks: relu, leaky_relu, silu, gelu, tanh, elu, selu, hardswish, softplus or
    mish."""
    activation_constant: float | None = None
    """Not for kind rnvp: slope of leaky_relu, or alpha of elu; by default the usual constant of the activation."""
    coupling: Literal["affine", "separate", "additive", "spline"] = "affine"
    """Not for kind rnvp: what becomes of the transformed numbers v. affine: v·e^s + t, with one network for s and t; separate:
    the same with one for each; additive: v + t; spline: a rational-quadratic spline of each number. Kind autoregressive has
    affine and spline."""
    bins: int = 8
    """For coupling spline: bins of a spline."""
    bound: float = 5.0
    """For coupling spline: the splines act on numbers between -bound and bound."""
    log_scale: str = "tanh"
    """Not for kind rnvp: the function that gives the log-scales: tanh, exp, glow, nflows, atan, softclip, jet,
    softplus, clamp or bayesflow."""
    log_scale_constant: float | None = None
    """Not for kind rnvp: constant of the log-scale function; by default the usual constant of the function."""
    add_first: bool = False
    """For kind coupling: compute (v + t)·e^s instead of v·e^s + t."""
    linear: Literal["plu", "dense", "permutation"] = "plu"
    """Not for kind rnvp: the linear layer of each step."""
    actnorm: bool = True
    """Not for kind rnvp: begin each step with an ActNorm."""
    blocks: int = 4
    """For kind rnvp: number of two-sided blocks."""
    clamp: float = 2.0
    """For kind rnvp: bound of the log-scales."""
    seed: int = 0
    """For kind rnvp: random seed of the fixed permutations."""

    CHOICE: ClassVar[str] = "kind"
    RULES: ClassVar[Mapping[str, Rule]] = {
        "hidden": (lambda value: len(value) <= 8 and all(n > 0 for n in value), "zero to eight positive widths"),
        "steps": _DEPTH,
        "bins": (lambda value: value in range(2, 33), "between 2 and 32"),
        "bound": POSITIVE,
        "blocks": _DEPTH,
        "clamp": POSITIVE,
    }

    def effective(self) -> dict[str, Any]:
        """The fields that have an effect with this kind, by name."""
        rnvp, splines = ("blocks", "clamp", "seed"), ("bins", "bound")
        scales = ("log_scale", "log_scale_constant", "add_first")
        without = {"additive": splines + scales, "spline": scales}.get(self.coupling, splines)
        fields = dict(vars(self))
        if self.kind == "rnvp":
            return {name: fields[name] for name in ("kind", "hidden", *rnvp)}
        if self.kind == "autoregressive":
            without = (*without, "add_first")
        return {name: value for name, value in fields.items() if name not in (*rnvp, *without)}

    def choice(self, name: str) -> str:
        """The field that decides whether the field `name` has an effect."""
        of_coupling = name in ("bins", "bound", "log_scale", "log_scale_constant", "add_first")
        of_kind = self.kind == "rnvp" or (self.kind == "autoregressive" and name == "add_first")
        return "coupling" if of_coupling and not of_kind else "kind"

    def mistake(self) -> str:
        """A message if the flow cannot be built with these settings, else ""."""
        if self.kind == "rnvp" and (len(self.hidden) != 2 or self.hidden[0] != self.hidden[1]):
            return f'hidden = {shown(self.hidden)} must be two equal widths for flow.kind = "rnvp"'
        if self.kind == "autoregressive" and self.coupling not in ("affine", "spline"):
            return f'coupling = "{self.coupling}" must be "affine" or "spline" for flow.kind = "autoregressive"'
        try:
            with torch.random.fork_rng(devices=[]):
                replace(self, steps=1, blocks=1, hidden=(1,) * len(self.hidden)).build(2)
        except (ValueError, TypeError) as error:
            return str(error)
        return ""

    def build(self, dim: int, context_dim: int = 0) -> Flow:
        """The flow on vectors of length `dim`, given a context of length `context_dim`; raises UserError if there is none."""
        options = {name: value for name, value in self.effective().items() if name != "kind"}
        if self.kind == "rnvp":
            if context_dim:
                raise UserError('flow.kind = "rnvp" takes no context; choose the kind "coupling"')
            return rnvp_flow(dim, **{**options, "hidden": self.hidden[0]})
        if self.coupling == "spline":
            bound = options.pop("bound")
            options["spline"] = {"bins": options.pop("bins"), "low": -bound, "high": bound}
        if self.kind == "autoregressive":
            return AutoregressiveFlow(dim, context_dim=context_dim, transform=options.pop("coupling"), **options)
        return CouplingFlow(dim, context_dim=context_dim, **options)
