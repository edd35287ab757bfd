"""Normalizing flows as torch modules. `forward` is data → noise, `inverse` noise → data; both return (output, logdet)."""

from glf_fast.flow.actnorm import ActNorm
from glf_fast.flow.affine_coupling import AffineCoupling
from glf_fast.flow.autoregressive_flow import AutoregressiveFlow
from glf_fast.flow.base import Flow
from glf_fast.flow.coupling_flow import CouplingFlow
from glf_fast.flow.distribution import FlowDistribution, FlowTransform
from glf_fast.flow.embedded import Embedded
from glf_fast.flow.ensemble import FlowEnsemble
from glf_fast.flow.fixed_linear import FixedLinear
from glf_fast.flow.glow_flow import GlowFlow
from glf_fast.flow.glow_network import GlowNetwork
from glf_fast.flow.inverse import Inverse
from glf_fast.flow.linear import InvertibleLinear
from glf_fast.flow.mlp import MLP, SeparateNetworks
from glf_fast.flow.residual import ResidualNet
from glf_fast.flow.rnvp import rnvp_flow
from glf_fast.flow.sequential import SequentialFlow
from glf_fast.flow.spline_coupling import SplineCoupling
from glf_fast.flow.split import Split
from glf_fast.flow.squeeze import Squeeze

__all__ = [
    "MLP",
    "ActNorm",
    "AffineCoupling",
    "AutoregressiveFlow",
    "CouplingFlow",
    "Embedded",
    "FixedLinear",
    "Flow",
    "FlowDistribution",
    "FlowEnsemble",
    "FlowTransform",
    "GlowFlow",
    "GlowNetwork",
    "Inverse",
    "InvertibleLinear",
    "ResidualNet",
    "SeparateNetworks",
    "SequentialFlow",
    "SplineCoupling",
    "Split",
    "Squeeze",
    "rnvp_flow",
]
