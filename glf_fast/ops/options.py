"""The options of affine couplings, as the backends hand them on."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from glf_fast.reference import LOG_SCALES

__all__ = ["Options"]


class Options(NamedTuple):
    """The options of a flow or of an elementwise coupling, by name; `activation` means nothing to the latter."""

    activation: str
    log_scale: str
    log_scale_constant: float | None
    add_first: bool
    inverse: bool
    density: bool = False  # log N(z; 0, I) is added to the logdet
    autocast: str = ""  # of the conditioner's products: "bf16" or "fp16" under torch.autocast

    @property
    def constant(self) -> float:
        """The log-scale's constant as kernels take it: ln m for softclip, 0 where there is none."""
        constant = LOG_SCALES[self.log_scale] if self.log_scale_constant is None else self.log_scale_constant
        if self.log_scale == "softclip":
            assert constant is not None
            constant = math.log(constant)
        return constant or 0.0

    def of_flow(self) -> dict[str, Any]:
        """Keyword arguments of the reference's flows, whose direction is in their name."""
        names = ("activation", "log_scale", "log_scale_constant", "add_first")
        return {name: getattr(self, name) for name in names}

    def of_coupling(self) -> dict[str, Any]:
        """Keyword arguments of the reference's elementwise coupling."""
        names = ("log_scale", "log_scale_constant", "add_first", "inverse")
        return {name: getattr(self, name) for name in names}
