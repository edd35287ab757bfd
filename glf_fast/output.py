"""Output to terminals of any encoding, to pipes whose reader goes away, and to nowhere."""

from __future__ import annotations

import contextlib
import os
from typing import Any

__all__ = ["Output", "one_line"]


def one_line(text: str) -> str:
    """Text on one line, without control characters: names of files may hold what would command a terminal."""
    return _printable(" ".join(text.split()))


def _printable(text: str, allowed: str = "") -> str:
    """Text with its control characters, but for the allowed ones, as TOML and JSON escape them."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in allowed else _escaped(ord(c)) for c in text)


def _escaped(code: int) -> str:
    return f"\\u{code:04x}" if code < 1 << 16 else f"\\U{code:08x}"


class Output:
    """A stream of text for a terminal of any encoding. Control characters are shown as escapes, and command no terminal.

    Args:
        stream: the stream to write to. What is written to it directly stays as it is.
        may_vanish: whether writing fails in silence once there is no reader any more, no space, or no stream at all.
    """

    def __init__(self, stream: Any, may_vanish: bool = False) -> None:
        self.stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        self._ignored: tuple[type[OSError], ...] = (OSError,) if may_vanish else ()
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        """Write text."""
        with contextlib.suppress(*self._ignored):
            # Progress bars write over themselves: they alone begin with a carriage return.
            start = text[:1] if text.startswith("\r") else ""
            self.stream.write(start + _printable(text[len(start) :], "\n"))
        return len(text)

    def flush(self) -> None:
        """Write what is held back."""
        with contextlib.suppress(*self._ignored):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
