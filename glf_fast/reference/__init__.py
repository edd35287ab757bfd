"""The specification: every operation in plain PyTorch, in the signatures that the fast kernels implement.

Written to be read, never tuned. It runs on any device and dtype, is differentiable (twice, too), and is the oracle of every
test: in float64 it is what all other implementations are compared with.
"""

from glf_fast.reference.affine_coupling import affine_coupling
from glf_fast.reference.autoregressive_flow import (
    TRANSFORMS,
    autoregressive_flow,
    autoregressive_flow_inverse,
    autoregressive_flow_log_prob,
)
from glf_fast.reference.coupling import COUPLINGS, Coupling
from glf_fast.reference.coupling_flow import (
    actnorm_log_prob,
    coupling_flow,
    coupling_flow_inverse,
    coupling_flow_log_prob,
    log_normal,
    plu_flow_log_prob,
)
from glf_fast.reference.dropout import Dropout
from glf_fast.reference.glow_network import glow_network
from glf_fast.reference.linear import (
    Plu,
    fold_actnorm,
    invertible_linear,
    permutation_matrix,
    plu_assemble,
    slogdet_inverse,
)
from glf_fast.reference.log_scale import LOG_SCALE_FUNCTIONS, LOG_SCALES, LogScale, log_scale, prepared_constant
from glf_fast.reference.made import MASKED_NETWORKS, fan_in, made
from glf_fast.reference.mlp import (
    ACTIVATION_FUNCTIONS,
    ACTIVATIONS,
    NEED_INPUT,
    Activation,
    activation_of,
    constant_of_activation,
    mlp,
)
from glf_fast.reference.networks import NETWORKS, Network
from glf_fast.reference.residual import layers_of_block, residual
from glf_fast.reference.spline import PARAMETRIZATIONS, TAILS, PreparedSpline, Spline, spline

__all__ = [
    "ACTIVATIONS",
    "ACTIVATION_FUNCTIONS",
    "COUPLINGS",
    "LOG_SCALES",
    "LOG_SCALE_FUNCTIONS",
    "MASKED_NETWORKS",
    "NEED_INPUT",
    "NETWORKS",
    "PARAMETRIZATIONS",
    "TAILS",
    "TRANSFORMS",
    "Activation",
    "Coupling",
    "Dropout",
    "LogScale",
    "Network",
    "Plu",
    "PreparedSpline",
    "Spline",
    "activation_of",
    "actnorm_log_prob",
    "affine_coupling",
    "autoregressive_flow",
    "autoregressive_flow_inverse",
    "autoregressive_flow_log_prob",
    "constant_of_activation",
    "coupling_flow",
    "coupling_flow_inverse",
    "coupling_flow_log_prob",
    "fan_in",
    "fold_actnorm",
    "glow_network",
    "invertible_linear",
    "layers_of_block",
    "log_normal",
    "log_scale",
    "made",
    "mlp",
    "permutation_matrix",
    "plu_assemble",
    "plu_flow_log_prob",
    "prepared_constant",
    "residual",
    "slogdet_inverse",
    "spline",
]
