"""The specification: every operation in plain PyTorch, in the signatures that the fast kernels implement.

Written to be read, never tuned. It runs on any device and dtype, is differentiable (twice, too), and is the oracle of every
test: in float64 it is what all other implementations are compared with.
"""

from glf_fast.reference.affine_coupling import affine_coupling
from glf_fast.reference.coupling_flow import (
    actnorm_log_prob,
    coupling_flow,
    coupling_flow_inverse,
    coupling_flow_log_prob,
    log_normal,
    plu_flow_log_prob,
)
from glf_fast.reference.linear import (
    Plu,
    fold_actnorm,
    invertible_linear,
    lu_factor,
    permutation_matrix,
    plu_assemble,
    slogdet_inverse,
)
from glf_fast.reference.log_scale import LOG_SCALES, log_scale
from glf_fast.reference.mlp import ACTIVATIONS, mlp

__all__ = [
    "ACTIVATIONS",
    "LOG_SCALES",
    "Plu",
    "actnorm_log_prob",
    "affine_coupling",
    "coupling_flow",
    "coupling_flow_inverse",
    "coupling_flow_log_prob",
    "fold_actnorm",
    "invertible_linear",
    "log_normal",
    "log_scale",
    "lu_factor",
    "mlp",
    "permutation_matrix",
    "plu_assemble",
    "plu_flow_log_prob",
    "slogdet_inverse",
]
