"""glf_fast: fast affine-coupling normalizing flows, and Generative Latent Flow on top of them.

Importing needs torch alone and touches no GPU, compiler or network. `GLF`, `convert`, `accelerate`, `fit`,
`GraphedStep` and `integrations` are loaded when first asked for.
"""

from __future__ import annotations

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

from glf_fast.flow import (
    MLP,
    ActNorm,
    AffineCoupling,
    AutoregressiveFlow,
    CouplingFlow,
    FixedLinear,
    Flow,
    FlowDistribution,
    FlowEnsemble,
    FlowTransform,
    GlowFlow,
    Inverse,
    InvertibleLinear,
    ResidualNet,
    SeparateNetworks,
    SequentialFlow,
    SplineCoupling,
    Split,
    Squeeze,
    rnvp_flow,
)
from glf_fast.ops import backends, use_backend
from glf_fast.reference import Spline

if TYPE_CHECKING:
    from glf_fast import integrations
    from glf_fast.conversion import ConversionError, convert
    from glf_fast.conversion.accelerate import accelerate
    from glf_fast.fitting import FitResult, GraphedStep, fit
    from glf_fast.models.glf import GLF

__version__ = _version("glf_fast")
__all__ = [
    "GLF",
    "MLP",
    "ActNorm",
    "AffineCoupling",
    "AutoregressiveFlow",
    "ConversionError",
    "CouplingFlow",
    "FitResult",
    "FixedLinear",
    "Flow",
    "FlowDistribution",
    "FlowEnsemble",
    "FlowTransform",
    "GlowFlow",
    "GraphedStep",
    "Inverse",
    "InvertibleLinear",
    "ResidualNet",
    "SeparateNetworks",
    "SequentialFlow",
    "Spline",
    "SplineCoupling",
    "Split",
    "Squeeze",
    "accelerate",
    "backends",
    "convert",
    "fit",
    "integrations",
    "rnvp_flow",
    "use_backend",
]


# Loaded when first asked for, and where from: most programs need none of them.
_LAZY = {
    "ConversionError": "glf_fast.conversion",
    "FitResult": "glf_fast.fitting",
    "GLF": "glf_fast.models.glf",
    "GraphedStep": "glf_fast.fitting",
    "accelerate": "glf_fast.conversion.accelerate",
    "convert": "glf_fast.conversion",
    "fit": "glf_fast.fitting",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(_import_module(_LAZY[name]), name)
    if name == "integrations":
        return _import_module("glf_fast.integrations")
    raise AttributeError(f"module 'glf_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
