"""Progress of training: a bar on a terminal, a line every few seconds elsewhere; and an orderly stop on signals."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from types import FrameType, TracebackType

from tqdm import tqdm

from glf_fast import distributed

__all__ = ["Progress", "Stop", "stop_on_signals"]

# Seconds between two lines where there is no terminal.
_SECONDS = 10.0


class Progress:
    """Display of progress on stderr: images seen of `total`, images per second without pauses, losses, and the time left."""

    def __init__(self, total: int, images: int, images_per_epoch: int, items: str = "images") -> None:
        self.total, self.images, self.images_per_epoch, self.items = total, images, images_per_epoch, items
        self.speed = 0.0
        self._clock = self._shown = time.monotonic()
        form = f"{{percentage:3.0f}}% {{bar}} {{n_fmt}}/{{total_fmt}} {items}, {{elapsed}} < {{remaining}}{{postfix}}"
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=images, unit_scale=True, bar_format=form) if terminal else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, images: int, losses: Mapping[str, float]) -> None:
        """Show the number of images seen so far, and the latest losses."""
        now = time.monotonic()
        new, self.images = images - self.images, images
        rate = new / max(now - self._clock, 1e-9)
        self.speed = rate if self.speed == 0 else 0.7 * self.speed + 0.3 * rate
        self._clock = now
        values = "  ".join(f"{name} {value:.4g}" for name, value in losses.items())
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self.speed:,.0f} {self.items}/s  {values}", refresh=False)
            self._bar.update(new)
        elif now - self._shown >= _SECONDS or images >= self.total:
            self._shown = now
            epoch = (images - 1) // self.images_per_epoch + 1
            left = time.strftime("%H:%M:%S", time.gmtime((self.total - images) / self.speed))
            self.say(
                f"epoch {epoch}/{self.total // self.images_per_epoch}  {images:,}/{self.total:,} {self.items}  "
                f"{self.speed:,.0f} {self.items}/s  {values}  {left} left"
            )

    def say(self, message: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(message, file=sys.stderr)
        else:
            print(message, file=sys.stderr, flush=True)

    def pause(self) -> None:
        """Exclude the time since the last update from the speed, because it was spent on scores and pictures."""
        self._clock = time.monotonic()


class Stop:
    """Number of the signal that asked for a stop; 0 if there was none."""

    signal = 0


@contextlib.contextmanager
def stop_on_signals(*numbers: int) -> Iterator[Stop]:
    """Inside the block, the first of these signals only sets the yielded `Stop`; a second one acts as usual.

    Under torchrun a second one, and one after the block, changes nothing: torchrun, the terminal and Slurm all send the same
    signal to every process.

    Python handles signals in its main thread, so that in another thread nothing is set.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in numbers}

    def note(number: int, frame: FrameType | None) -> None:
        stop.signal = number
        if distributed.together():
            return
        for known, handler in before.items():
            signal.signal(known, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if stop.signal and distributed.together() else handler)
