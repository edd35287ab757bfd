"""Output to terminals of any encoding, to pipes whose reader goes away, and to nowhere."""

from __future__ import annotations

import contextlib
import os
from typing import Any

__all__ = ["Output", "one_line"]


def one_line(text: str) -> str:
    """Text on one line, without control characters: names of files may hold what would command a terminal."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in " ".join(text.split())
    )


class Output:
    """A stream of text for a terminal of any encoding.

    Args:
        may_vanish: whether writing fails in silence once there is no reader any more, no space, or no stream at all.
    """

    def __init__(self, stream: Any, may_vanish: bool = False) -> None:
        self._stream = stream or open(os.devnull, "w")  # noqa: SIM115
        self._ignored: tuple[type[OSError], ...] = (OSError,) if may_vanish else ()
        if hasattr(self._stream, "reconfigure"):
            self._stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        """Write text."""
        with contextlib.suppress(*self._ignored):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write what is held back."""
        with contextlib.suppress(*self._ignored):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
