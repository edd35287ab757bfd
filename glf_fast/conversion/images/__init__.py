"""Layers on images (C, H, W): convolutional conditioners stay what they are, all else becomes one product and one kernel."""

from __future__ import annotations

from typing import Any

__all__ = ["on_images"]


def on_images(flow: Any) -> bool:
    """Whether the flow of a library says that it is one on images: by its base, or by the shape of its input."""
    kind = type(flow).__name__
    if kind == "SequenceINN":
        shape = flow.shapes[0]
    elif kind == "GraphINN":
        shape = flow.in_nodes[0].output_dims[0]
    else:
        base = getattr(flow, "_distribution", None) or getattr(flow, "q0", None)
        shape = getattr(base, "_shape", getattr(base, "shape", ()))
    return len(shape) == 3
