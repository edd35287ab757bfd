"""glf_fast: fast affine-coupling normalizing flows, and Generative Latent Flow on top of them.

Importing needs torch alone and touches no GPU, compiler or network. `GLF` is loaded when first asked for.
"""

from __future__ import annotations

from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

from glf_fast.flow import (
    MLP,
    ActNorm,
    AffineCoupling,
    CouplingFlow,
    Flow,
    FlowDistribution,
    FlowTransform,
    InvertibleLinear,
    SequentialFlow,
    rnvp_flow,
)
from glf_fast.ops import backends, use_backend

if TYPE_CHECKING:
    from glf_fast.models.glf import GLF

__version__ = _version("glf_fast")
__all__ = [
    "GLF",
    "MLP",
    "ActNorm",
    "AffineCoupling",
    "CouplingFlow",
    "Flow",
    "FlowDistribution",
    "FlowTransform",
    "InvertibleLinear",
    "SequentialFlow",
    "backends",
    "rnvp_flow",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name == "GLF":
        from glf_fast.models.glf import GLF

        return GLF
    raise AttributeError(f"module 'glf_fast' has no attribute {name!r}")
