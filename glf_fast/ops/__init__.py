"""Functions on tensors: what a flow computes. Arguments are checked here, and here alone it is known which backend runs.

Every function has the signature and the meaning of its namesake in `glf_fast.reference`, which runs
where no kernel does.
"""

from glf_fast.ops.actnorm import actnorm_log_prob
from glf_fast.ops.affine_coupling import affine_coupling
from glf_fast.ops.autoregressive_flow import (
    autoregressive_flow,
    autoregressive_flow_inverse,
    autoregressive_flow_log_prob,
)
from glf_fast.ops.backends import backends, check_environment, use_backend
from glf_fast.ops.coupling_flow import (
    coupling_flow,
    coupling_flow_inverse,
    coupling_flow_log_prob,
    plu_flow_log_prob,
)
from glf_fast.ops.glow_coupling import glow_coupling
from glf_fast.ops.glow_network import glow_network
from glf_fast.ops.identical import identical
from glf_fast.ops.linear import channel_map, fold_actnorm, invertible_linear, plu_assemble, slogdet_inverse
from glf_fast.ops.spline import spline

__all__ = [
    "actnorm_log_prob",
    "affine_coupling",
    "autoregressive_flow",
    "autoregressive_flow_inverse",
    "autoregressive_flow_log_prob",
    "backends",
    "channel_map",
    "coupling_flow",
    "coupling_flow_inverse",
    "coupling_flow_log_prob",
    "fold_actnorm",
    "glow_coupling",
    "glow_network",
    "identical",
    "invertible_linear",
    "plu_assemble",
    "plu_flow_log_prob",
    "slogdet_inverse",
    "spline",
    "use_backend",
]

check_environment()  # when every op has named its backends
