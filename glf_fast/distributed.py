"""Processes that work together, as torchrun starts them: who prints and writes, what all agree on, and how they end.

Outside of `launched`, and without torchrun, there is one process, and every function here is the identity.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import itertools
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from glf_fast.errors import UserError, lacks_memory

__all__ = [
    "WAIT",
    "all_failed",
    "all_reduce_seconds",
    "broadcast",
    "by_main",
    "highest",
    "is_main",
    "joined",
    "launched",
    "mean",
    "own_device",
    "parts",
    "rank",
    "refuse_several",
    "size",
    "together",
    "total",
    "unhurried",
]

# The longest time for which a process waits for another one.
WAIT = timedelta(minutes=10)
# Seconds for which an error of process 0 waits for the errors of the others.
_PATIENCE = 5.0
# Seconds between two signs of life of a process inside of `unhurried`.
_BEAT = 1.0
# What torchrun tells each process; LOCAL_RANK is the number of its GPU.
_VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}

F = TypeVar("F", bound=Callable[..., Any])

_together = False  # whether this process is inside of `launched`; a process group of somebody else's is none of ours
_alone = False  # whether this process, the main one, does what the others wait for
_store: Any = None  # by which the processes found each other; it answers where a collective would wait
_failures = itertools.count()  # calls of `all_failed`
_blocks = itertools.count()  # calls of `unhurried`


@contextlib.contextmanager
def launched() -> Iterator[None]:
    """Join the processes that torchrun has started, for the block. Without torchrun nothing happens.

    Process 0 alone prints. An error that several processes have is printed once.

    Raises:
        UserError: the processes do not come together, or one of them has ended or does not answer within `WAIT`.
    """
    global _together, _store
    if not os.environ.keys() >= _VARIABLES:
        yield
        return
    _store = _join()
    _together = True
    try:
        with _quiet() if rank() else contextlib.nullcontext():
            try:
                yield
                ending = None
            except SystemExit as error:
                ending = error
        # A DistributedDataParallel that outlives its group may wait for ever when it is freed: it then frees the group, whose
        # thread may need Python's lock to end. An error's traceback holds the variables of all functions that it has left.
        if ending:
            traceback.clear_frames(ending.__traceback__)
        gc.collect()
        highest(0)  # nobody leaves before the others
        dist.destroy_process_group()
        if ending:
            raise ending
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        told = _told(error)
        if told is error and not _is_for_users(error):
            raise
        # What was asked for, and of which GPU, differs from process to process.
        message = "lack of memory" if lacks_memory(told) else str(told)
        if not _is_news(message, consequence=told is not error):
            sys.exit(2)
        raise told from error
    finally:
        _together, _store = False, None


def refuse_several() -> None:
    """Raise UserError where torchrun has started several processes, each of which would do, and write, the same."""
    if os.environ.keys() >= _VARIABLES and int(os.environ["WORLD_SIZE"]) > 1:
        if int(os.environ["RANK"]):
            sys.exit(2)
        raise UserError("this command runs in one process; start it without torchrun")


def _join() -> Any:
    """Make the process group; returns the store by which the processes found each other."""
    cuda = torch.cuda.is_available()
    try:
        store, number, count = next(iter(dist.rendezvous("env://", timeout=WAIT)))
        # With --max-restarts torchrun keeps the store, in which the processes of before have left their addresses.
        store = dist.PrefixStore(f"glf_fast {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        # Numbers on the CPU are agreed upon by gloo, so that no agreement waits for a GPU.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=store,
            rank=number,
            world_size=count,
            timeout=WAIT,
        )
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"the {os.environ['WORLD_SIZE']} processes did not come together at {where} within {_minutes()} "
            f"({str(error).splitlines()[0][:200]}); see docs/several-machines.md"
        ) from error
    return store


def _is_for_users(error: BaseException) -> bool:
    """Whether a command prints the error as one line."""
    return isinstance(error, (UserError, OSError)) or lacks_memory(error)


def _is_news(message: str, consequence: bool) -> bool:
    """Whether no other process has said the same; a consequence of another process's error is no news after that error."""
    with contextlib.suppress(RuntimeError):  # the process that holds the store may be gone
        again = _store.add(f"error {hashlib.sha256(message.encode()).hexdigest()}", 1) > 1
        said = _store.add("errors", 1) > 1  # last, because it is what process 0 waits for
        # Process 0 may hold the store, and most errors are those of all: it lets the others look first. After a consequence at
        # least one of them is missing.
        until = time.monotonic() + (_PATIENCE if is_main() else 0)
        while time.monotonic() < until and _store.add("errors", 0) < dist.get_world_size() - consequence:
            time.sleep(0.1)
        return not (again or (said and consequence))
    return True


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with (
        open(os.devnull, "w", encoding="utf-8") as null,
        contextlib.redirect_stdout(null),
        contextlib.redirect_stderr(null),
    ):
        yield


def _told(error: BaseException) -> BaseException:
    """The error of another process that is missing in words for users; any other error itself."""
    text = str(error)
    ours = isinstance(error, UserError) or not isinstance(error, RuntimeError)
    if ours or not (isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text):
        return error
    late = "imed out" in text or "timeout" in text
    what = f"did not answer for {_minutes()}" if late else "has ended"
    return UserError(
        f"another process of this job {what}; run the same command again: training goes on from its last checkpoint"
    )


def _minutes() -> str:
    seconds = WAIT.total_seconds()
    return f"{seconds / 60:g} minutes" if seconds >= 60 else f"{seconds:g} seconds"


# -- who is there ---------------------------------------------------------------------------------------------------------


def size() -> int:
    """Number of processes; 1 inside of `by_main`."""
    return dist.get_world_size() if _together and not _alone else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if _together else 0


def together() -> bool:
    """Whether torchrun has started this process, alone or with others."""
    return _together


def is_main() -> bool:
    """Whether this is process 0, which prints and writes."""
    return rank() == 0


def own_device() -> torch.device:
    """The GPU of this process, by its number among the processes of this machine, for CUDA's present device.

    Raises:
        UserError: there are fewer GPUs than processes.
    """
    local = int(os.environ["LOCAL_RANK"])
    if local >= torch.cuda.device_count():
        raise UserError(
            f"process {local} of this machine has no GPU, of which there are {torch.cuda.device_count()}; start "
            "torchrun with --nproc-per-node gpu, or use --device cpu"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def parts(n: int, multiple: int = 1) -> list[range]:
    """The numbers 0 … n − 1 as a range for each process, in order; ranges begin at multiples of `multiple`.

    Where there are fewer than processes, the first have some.
    """
    blocks, count = -(-n // multiple), size()
    bounds = [min(n, -(-blocks * i // count) * multiple) for i in range(count + 1)]
    return [range(begin, end) for begin, end in itertools.pairwise(bounds)]


# -- what all agree on ----------------------------------------------------------------------------------------------------


def by_main(function: F) -> F:
    """`function` as process 0 runs it alone: the others wait for its result, or for its error, which all raise, for as long as
    it takes (`unhurried`).

    Such an error is a UserError, an OSError or a lack of memory; any other one is a bug, and ends process 0 alone. Inside of
    `function` there is one process, as without torchrun.
    """

    @functools.wraps(function)
    def called(*arguments: Any, **options: Any) -> Any:
        global _alone
        if size() == 1:
            return function(*arguments, **options)
        outcome: list[Any] = [None, None]
        with unhurried():  # outside of the broadcast, which waits no longer than `WAIT`
            if is_main():
                _alone = True
                try:
                    outcome[0] = function(*arguments, **options)
                except Exception as error:
                    if not _is_for_users(error):
                        raise
                    outcome[1] = error
                finally:
                    _alone = False
        dist.broadcast_object_list(outcome, 0, device=torch.device("cpu"))
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    return called  # type: ignore[return-value]


def all_failed() -> bool:
    """Whether all processes have met an error at the same point; to be asked by each that would go on after one.

    A process that goes on after an error of its own alone calls other collectives than the others, which then wait for it until
    `WAIT` is over. So the question is put through the store, and the point is the number of collectives so far.
    """
    if size() == 1:
        return True
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    group: Any = dist.group.WORLD
    # Private names. A count of ours would miss the collectives that DistributedDataParallel begins in the middle of a
    # backward, and torch has no public one: its flight recorder, which has the number too, keeps nothing on CPUs.
    try:
        point = [group._get_backend(torch.device(device))._get_sequence_number_for_group() for device in devices]
    except AttributeError:  # of another torch: then an error ends all processes, in `compare`, too
        return False
    key, until = f"failure {next(_failures)} at {point}", time.monotonic() + _PATIENCE
    _store.add(key, 1)
    while _store.add(key, 0) < size():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


@contextlib.contextmanager
def unhurried() -> Iterator[None]:
    """A block that all processes enter, and that may take one of them longer than `WAIT`: a download, or decoding.

    At its end a process waits for the others, as long as one of those inside gives signs of life.

    Raises:
        RuntimeError: another process has ended, or none inside has given a sign of life for `WAIT`.
    """
    if size() == 1:
        yield
        return
    store, key, left = _store, f"block {next(_blocks)}", threading.Event()

    def live() -> None:
        with contextlib.suppress(RuntimeError):
            while not left.wait(_BEAT):
                store.add(f"signs in {key}", 1)

    thread = threading.Thread(target=live, daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join()
    store.add(key, 1)
    signs, since, pause = 0, time.monotonic(), 0.01
    while store.add(key, 0) < size():
        if store.add("errors", 0):
            raise dist.DistError("another process has ended")
        if (now := store.add(f"signs in {key}", 0)) > signs:
            signs, since = now, time.monotonic()
        if time.monotonic() - since > WAIT.total_seconds():
            raise dist.DistError("timed out")
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


def highest(*values: int) -> list[int]:
    """The largest of the values of all processes, place by place."""
    if size() == 1:
        return list(values)
    found = torch.tensor(values)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def total(value: int) -> int:
    """The sum over all processes."""
    if size() == 1:
        return value
    found = torch.tensor(value)
    dist.all_reduce(found)
    return int(found)


def mean(values: Tensor) -> Tensor:
    """The mean over all processes."""
    if size() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / size()


def joined(own: Tensor, lengths: Sequence[int]) -> Tensor:
    """The rows (N, …) of all processes, in order; `lengths` are the numbers of their rows."""
    if size() == 1:
        return own
    padded = own.new_zeros((max(lengths), *own.shape[1:]))
    padded[: len(own)] = own
    found = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(found, padded)
    return torch.cat([rows[:length] for rows, length in zip(found, lengths, strict=True)])


def broadcast(tensors: Sequence[Tensor]) -> None:
    """Give tensors the values that they have in process 0."""
    if size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)


def all_reduce_seconds(numbers: int, device: torch.device) -> float:
    """The time in which so many float32 numbers are added up over all processes: the best of three."""
    values, seconds = torch.zeros(numbers, device=device), []
    for _ in range(3):
        highest(0)
        started = time.perf_counter()
        dist.all_reduce(values)
        values[:1].item()  # waits for a GPU
        seconds.append(time.perf_counter() - started)
    return min(seconds)
