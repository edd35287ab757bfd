"""TensorBoard's log of a run: an extra, which ends nothing where it cannot be written."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from glf_fast.distributed import is_main

__all__ = ["Board"]


class Board:
    """Scalars and pictures of a run in `folder`, of the main process alone.

    After the first failure a line says so, and nothing more is written.

    Args:
        images: so many training images are seen already; what an earlier process wrote beyond them is hidden.
    """

    def __init__(self, folder: Path, images: int) -> None:
        self._folder, self._images = folder, images
        self._writer: SummaryWriter | None = None
        self._failed = False

    def scalar(self, name: str, value: float, images: int) -> None:
        """Log a number after so many training images."""
        with self._as_far_as_possible():
            if self._writer is not None and not self._failed:
                self._writer.add_scalar(name, value, images)

    def image(self, name: str, picture: Tensor, images: int) -> None:
        """Log a uint8 picture (C, H, W) after so many training images."""
        with self._as_far_as_possible():
            if self._writer is not None and not self._failed:
                self._writer.add_image(name, picture, images)

    def __enter__(self) -> Board:
        # First, because the writer's thread may fail at once.
        self._hook, threading.excepthook = threading.excepthook, self._in_thread
        with self._as_far_as_possible():
            if is_main():
                self._writer = SummaryWriter(str(self._folder), purge_step=self._images)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        with self._as_far_as_possible():
            if self._writer is not None and not self._failed:
                self._writer.close()
        threading.excepthook = self._hook

    def _in_thread(self, failure: threading.ExceptHookArgs) -> None:
        """TensorBoard writes in a thread of its own, whose errors would be printed with a traceback."""
        if issubclass(failure.exc_type, OSError):
            self._give_up(failure.exc_value)
        else:
            self._hook(failure)

    @contextlib.contextmanager
    def _as_far_as_possible(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: BaseException | None) -> None:
        if not self._failed:
            print(f"{self._folder} cannot be written ({error}); training goes on without it", file=sys.stderr)
        self._failed = True
