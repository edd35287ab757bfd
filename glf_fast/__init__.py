"""glf_fast: fast affine-coupling normalizing flows, and Generative Latent Flow on top of them.

Importing needs torch alone and touches no GPU, compiler or network. `GLF`, `convert`, `ConversionError` and `accelerate`
are loaded when first asked for.
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
    Inverse,
    InvertibleLinear,
    SequentialFlow,
    rnvp_flow,
)
from glf_fast.ops import backends, use_backend

if TYPE_CHECKING:
    from glf_fast.conversion import ConversionError, convert
    from glf_fast.conversion.accelerate import accelerate
    from glf_fast.models.glf import GLF

__version__ = _version("glf_fast")
__all__ = [
    "GLF",
    "MLP",
    "ActNorm",
    "AffineCoupling",
    "ConversionError",
    "CouplingFlow",
    "Flow",
    "FlowDistribution",
    "FlowTransform",
    "Inverse",
    "InvertibleLinear",
    "SequentialFlow",
    "accelerate",
    "backends",
    "convert",
    "rnvp_flow",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name == "GLF":
        from glf_fast.models.glf import GLF

        return GLF
    if name in ("ConversionError", "convert"):
        from glf_fast import conversion

        return getattr(conversion, name)
    if name == "accelerate":
        from glf_fast.conversion.accelerate import accelerate

        return accelerate
    raise AttributeError(f"module 'glf_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
