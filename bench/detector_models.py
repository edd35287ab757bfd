"""anomalib's flow models with backbones of random weights, for tests and benchmarks; `make communities` installs it."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any
from unittest import mock

import torch

__all__ = ["MISSING", "cflow", "fastflow", "uflow"]

MISSING = "" if importlib.util.find_spec("anomalib") else "anomalib is not installed: run make communities"


def _imported() -> None:
    """Import the models' packages.

    torchvision of PyPI is compiled for CUDA, and without CUDA its operators are missing. The models call none of them, but its
    Python wants to know their schemas.
    """
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import anomalib.models  # noqa: F401


def cflow(backbone: str = "resnet18", layers: tuple[str, ...] = ("layer1", "layer2"), **options: Any) -> Any:
    """A CflowModel."""
    _imported()
    from anomalib.models.image.cflow.torch_model import CflowModel

    return CflowModel(backbone, list(layers), pre_trained=False, **options)


def fastflow(size: int, **options: Any) -> Any:
    """A FastflowModel of square images."""
    _imported()
    from anomalib.models.image.fastflow.torch_model import FastflowModel

    return FastflowModel((size, size), "resnet18", pre_trained=False, **options)


def uflow(size: int, **options: Any) -> Any:
    """A UflowModel of square images. Its class asks for trained weights, which would be fetched."""
    _imported()
    import timm
    from anomalib.models.image.uflow.torch_model import UflowModel

    create = timm.create_model
    with mock.patch("timm.create_model", lambda *a, **k: create(*a, **{**k, "pretrained": False})):
        return UflowModel((size, size), backbone="resnet18", **options)
