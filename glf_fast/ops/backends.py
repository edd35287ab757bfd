"""Which implementations of the operations this installation has."""

from __future__ import annotations

__all__ = ["backends"]


def backends() -> dict[str, str]:
    """Name → one line that says whether and where that backend runs. `"reference"` always does."""
    return {"reference": "ready: plain PyTorch, any device and dtype"}
