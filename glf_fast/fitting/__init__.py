"""Training a flow on a data set of tensors: `fit`, whose result is a `FitResult`, and `GraphedStep`, one step of it."""

from glf_fast.fitting.graphed import GraphedStep
from glf_fast.fitting.maximum_likelihood import fit
from glf_fast.fitting.run import FitResult

__all__ = ["FitResult", "GraphedStep", "fit"]
