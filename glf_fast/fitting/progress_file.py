"""The file from which an interrupted `fit` goes on: flow, best weights, optimizer, random state and losses."""

from __future__ import annotations

import hashlib
import io
import time
from pathlib import Path
from typing import Any

import torch

from glf_fast.errors import UserError
from glf_fast.files import atomic_write

__all__ = ["ProgressFile"]

FORMAT = 1
DIGEST = 32  # bytes of SHA-256 at the file's end: torch.load does not notice a wrong byte
OTHER = {"data": "other data", "flow": "another flow"}  # settings whose values tell nobody anything
SECONDS = 10.0  # between two writes at least, and twenty times as long as the last one took


class ProgressFile:
    """A file that is whole or absent, and that executes no code when it is read.

    Args:
        path: its path; None: nothing is read or written.
        settings: what must be the same for a run to go on, by name; plain values.
    """

    def __init__(self, path: Path | str | None, settings: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.settings = settings
        self._due = time.monotonic() + SECONDS

    def read(self) -> dict[str, Any] | None:
        """What `write` has written last; None where there is no file.

        Raises:
            UserError: it is damaged, or another run's.
        """
        if self.path is None or not self.path.exists():
            return None
        remedy = "delete it, or give another path to start from the beginning"
        content, digest = (file := self.path.read_bytes())[:-DIGEST], file[-DIGEST:]
        if hashlib.sha256(content).digest() != digest:
            raise UserError(f"{self.path} is damaged or not a file of glf_fast.fit; {remedy}")
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if found["format"] != FORMAT:
            raise UserError(f"{self.path} was written by another version of glf_fast; {remedy}")
        for name, value in self.settings.items():
            if (its := found["settings"][name]) != value:
                what = OTHER.get(name) or f"{name}={its!r}, not {value!r}"
                raise UserError(f"the run in {self.path} has {what}; {remedy}")
        return found["state"]

    def due(self) -> bool:
        """Whether it is time to write again."""
        return self.path is not None and time.monotonic() >= self._due

    def write(self, state: dict[str, Any]) -> None:
        """Replace the file by one with this state, of tensors and plain values."""
        if self.path is None:
            return
        start = time.monotonic()
        buffer = io.BytesIO()
        torch.save({"format": FORMAT, "settings": self.settings, "state": state}, buffer)
        content = buffer.getvalue()
        with atomic_write(self.path) as temporary:
            temporary.write_bytes(content + hashlib.sha256(content).digest())
        end = time.monotonic()
        self._due = end + max(SECONDS, 20 * (end - start))
