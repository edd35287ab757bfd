"""torch.compile as a baseline: for the sizes at hand, and never silently given up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["compiled"]


def compiled(function: Callable[..., Any], mode: str | None = None) -> Any:
    """The function under torch.compile for fixed shapes; call torch.compiler.reset() between cases.

    All flows share the code of their methods, and after eight versions of it torch.compile runs it uncompiled, with a line in
    the log at most: here that is an error.
    """
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(function, dynamic=False, mode=mode)
