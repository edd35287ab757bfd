"""Processes that work together, as torchrun starts them, and what they do in tests of training."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import forked
import torch
import torch.distributed as dist
from torch import Tensor
from toy_models import Adversarial

from glf_fast import distributed, models
from glf_fast.data import SOURCES, ImageDataset, TokenDataset, celeba
from glf_fast.data.routes import File
from glf_fast.data.strings import token_dataset
from glf_fast.errors import UserError, run_command
from glf_fast.files import atomic_write, file_digest
from glf_fast.grammar import EXPRESSIONS, Grammar, sentences
from glf_fast.settings import updated
from glf_fast.training import checkpoint, parallel
from glf_fast.training.comparison import _Results
from glf_fast.training.comparison_plan import Plan
from glf_fast.training.config import DataConfig, OptimizerConfig, default
from glf_fast.training.pictures import draw
from glf_fast.training.splits import load_splits
from glf_fast.training.trainer import Trainer

__all__ = [
    "CASES",
    "CPU",
    "agreeing",
    "curve",
    "curves",
    "drawing",
    "failing_rows",
    "fetching",
    "finished",
    "images",
    "impatient",
    "leaving",
    "resulting",
    "started",
]

CPU = torch.device("cpu")
_SMALL: dict[str, Any] = {"latent_dim": 4, "width": 4, "hidden": 16}
_FLOW: dict[str, Any] = {"steps": 2, "hidden": [8]}
_SEQUENCE: dict[str, Any] = {"latent_dim": 4, "channels": [4], "kernels": [2], "dense": 16, "units": 8, "layers": 1}
# Models in all their stages and phases: the name of the model, and its settings.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "glf": ("glf", {**_SMALL, "latent_noise": 0.05, "flow": _FLOW, "flow_epochs": 1}),
    "glf, one loss": ("glf", {**_SMALL, "latent_noise": 0.05, "flow": _FLOW, "stop_gradient": False}),
    "glf, rnvp": ("glf", {**_SMALL, "flow": {"kind": "rnvp", "hidden": [8, 8], "blocks": 1}}),
    "glf, maf": ("glf", {**_SMALL, "flow": {**_FLOW, "kind": "autoregressive"}}),
    "vae": ("vae", {**_SMALL, "density": {"kind": "gaussian"}}),
    "rae": ("rae", {**_SMALL, "regularizer": "gp", "density": {"kind": "mixture", "components": 2}}),
    "rae, sn": ("rae", {**_SMALL, "regularizer": "sn", "density": {"kind": "none"}}),
    "wae": ("wae-mmd", {**_SMALL, "density": {"kind": "flow", "steps": 1, "hidden": [8], "epochs": 1}}),
    "glann": ("glann", {**_SMALL, "items": 32, "matched": 12, "mapping_epochs": 1}),
    "flow-vae": ("flow-vae", {**_SMALL, "posterior": "flow", "flow": _FLOW}),
    "two-stage-vae": ("two-stage-vae", {**_SMALL, "second_stage": {"hidden": [8], "epochs": 1}}),
    "glow": ("glow", {"levels": 2, "steps": 1, "width": 4, "reversible": True}),
    "glow, conditional": ("glow", {"levels": 1, "steps": 1, "width": 4, "conditional": True}),
    "wae-gan": ("wae-gan", {**_SMALL, "code_hidden": [8], "density": {"kind": "gaussian"}}),
    "alpha-gan": ("alpha-gan", {"latent_dim": 4, "width": 4, "code_hidden": [8]}),
    "alpha-gan, other objectives": (
        "alpha-gan",
        {**_SMALL, "networks": "infogan", "posterior": "gaussian", "objective": "wasserstein"},
    ),
    "dcgan": ("dcgan", {"latent_dim": 4, "width": 4}),
    "wgan-gp": ("wgan-gp", {"latent_dim": 4, "width": 4, "critic_steps": 2}),
    "grammar-rae": (
        "grammar-rae",
        {**_SEQUENCE, "regularizer": "gp", "density": {"kind": "mixture", "components": 2}},
    ),
    "grammar-vae": ("grammar-vae", _SEQUENCE),
    "character-vae": ("character-vae", _SEQUENCE),
    "adversarial": ("adversarial", {"latent_dim": 4}),
}


def images() -> Tensor:
    """32 smooth grey images (32, 1, 8, 8) in [0, 1], float64."""
    noise = torch.rand(32, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.nn.functional.interpolate(noise, scale_factor=2.0, mode="bilinear")


def expressions() -> TokenDataset:
    """About 30 short expressions."""
    texts = ["".join(terminals) for terminals, _ in sentences(Grammar.of(EXPRESSIONS), 4)]
    return token_dataset("short", "train", texts[::2] + texts[1::4], EXPRESSIONS, "", "")


def trainer(case: str, *, local_batch_norm: bool = False) -> Trainer:
    """A trainer of one of the CASES, which takes batches of 12 images."""
    name, values = CASES[case]
    with mock.patch.dict(models._MODELS, adversarial=Adversarial):
        config = default(name)
        kind = models.kind(name)
        optimizers = dict.fromkeys(config.optimizers, OptimizerConfig(lr=1e-2, clip=1.0))
        model = updated(kind.Settings(), values, case)
        config = replace(config, model=model, batch_size=12, epochs=2, ema=0.9, optimizers=optimizers)
        smooth = ImageDataset("smooth", "train", images(), torch.arange(32) % 3, "")
        data = expressions() if "tokens" in kind.takes else smooth
        return Trainer(config, data, CPU, local_batch_norm=local_batch_norm)


def curve(case: str, *, local_batch_norm: bool = False) -> dict[str, Any]:
    """Losses of every step and final weights of a model that is trained in float64; all processes have equal states.

    Float64, because Adam's first steps turn the rounding of a gradient near zero into a step of another sign.
    """
    one = trainer(case, local_batch_norm=local_batch_norm)
    one.model.double()
    one.average.double()
    losses = []
    while True:
        inputs = one.inputs() if one.images < one.ends[one.stage] else None
        while one.images < one.ends[one.stage]:
            at = one.images % one.images_per_epoch
            index = one.share(torch.arange(at, at + 12))
            found = one.step(inputs[index], index)
            losses.append({name: distributed.mean(loss).item() for name, loss in found.items()})
            check_equal(one)
        if one.in_last_stage:
            return {"losses": losses, "weights": one.average.state_dict()}
        one.advance()
        check_equal(one)


def check_equal(one: Trainer) -> None:
    """Weights, average and the state of the optimizers are those of all processes, bit for bit."""
    if distributed.size() == 1:
        return
    tensors = [*one.model.state_dict().values(), *one.average.state_dict().values()]
    for optimizer in one.optimizers.values():
        tensors += [value for state in optimizer.state.values() for value in state.values()]
    digest = hashlib.sha256(b"".join(tensor.cpu().numpy().tobytes() for tensor in tensors)).hexdigest()
    every: list[Any] = [None] * distributed.size()
    dist.all_gather_object(every, digest)
    assert len(set(every)) == 1


def curves(cases: list[str], out: str) -> None:
    """The curves of models, of one process or several, saved by the first."""
    with distributed.launched():
        found = {case: curve(case) for case in cases}
        if distributed.size() > 1:
            curve(cases[0], local_batch_norm=True)
            model = trainer(cases[0]).model
            assert "statistics of 5 batch norms" in parallel.communication(model, 0, CPU, 1e-6)
            assert not parallel.communication(model, 0, CPU, 1e6)
        if distributed.is_main():
            torch.save(found, out)


@contextlib.contextmanager
def started(
    count: int, function: Callable[..., None], *arguments: object, file_size: int | None = None
) -> Iterator[list[forked.Child]]:
    """Processes that call the function, with what torchrun tells them; files of the first are no larger than `file_size`."""
    with socket.socket() as free, contextlib.ExitStack() as stack:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        children = []
        for rank in range(count):
            told = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": count,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            with mock.patch.dict(os.environ, {name: str(value) for name, value in told.items()}):
                child = forked.Child(function, *arguments, file_size=None if rank else file_size)
                children.append(stack.enter_context(contextlib.closing(child)))
        yield children


def finished(count: int, function: Callable[..., None], *arguments: object) -> list[tuple[str, str]]:
    """The output of processes that have ended well."""
    with started(count, function, *arguments) as children:
        printed = [child.communicate() for child in children]
        assert not any(child.returncode for child in children), printed
        return printed


def saved(count: int, cases: list[str], folder: Path) -> dict[str, Any]:
    """The curves of so many processes."""
    out = folder / f"{count}.pt"
    finished(count, curves, cases, str(out))
    return torch.load(out)


def failing_rows(first: int) -> None:
    """The rows of a comparison whose runs fail in several ways, from the first on; prints what was noted."""
    run_command(lambda: _failing_rows(first))


def _failing_rows(first: int) -> None:
    def lacks() -> None:
        raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {distributed.rank() + 1} GiB. GPU …")

    def wrong() -> None:
        raise UserError("wrong")

    def own(fails: Callable[[], None]) -> None:
        if distributed.rank():
            fails()
        distributed.highest(1, 2)

    def elsewhere() -> None:
        if distributed.rank():
            dist.all_reduce(torch.ones(1), async_op=True)  # as a backward begins them
        wrong()

    fails: dict[str, Callable[[], None]] = {
        "all lack memory": lacks,
        "process 0 lacks memory while the others wait": distributed.by_main(lacks),
        "all are wrong": wrong,
        "one lacks memory": lambda: own(lacks),
        "one is wrong": lambda: own(wrong),
        "all are wrong, in different places": elsewhere,
    }
    distributed._PATIENCE = 2.0
    with distributed.launched():
        results = _Results.__new__(_Results)
        results._note = lambda *noted: None  # type: ignore[method-assign]
        for name, fail in list(fails.items())[first:]:
            with results.noting_failure(name, 0):
                fail()
            distributed.by_main(print)("after", name)
        distributed.highest(0)
        lacks()  # where no row fails


def drawing(finite: int) -> None:
    """Draw 1,000 samples by two processes; of those of the second only the first ones, so many, are finite."""
    model = trainer("glf").model

    def sample(n: int, **_: Any) -> Tensor:
        x = torch.full((n, *model.shape), 0.5)
        x[finite if distributed.rank() else n :] = torch.nan
        return x

    with distributed.launched(), mock.patch.object(model, "sample", sample):
        draw(model, 1000, seed=0, divided=True)


def resulting(folder: str, elsewhere: str) -> None:
    """The record of a comparison's folder, of which the other processes see no file yet, is that of all processes."""
    run_command(lambda: _resulting(folder, elsewhere))


def _resulting(folder: str, elsewhere: str) -> None:
    with distributed.launched():
        plan = Plan(("glf", "vae"), "digits", "smoke", 1, out=Path(folder if distributed.is_main() else elsewhere))
        train, test = load_splits(plan.shared.data, None)
        record = _Results(plan, train, test, CPU).record()
        assert record == distributed.by_main(lambda: record)()
        print({row["name"]: [run["state"] for run in row["runs"]] for row in record["rows"]})


@dataclass(frozen=True)
class _Slow:
    """A route that copies files from a folder, in longer than processes wait, and notes that it did."""

    folder: Path
    place: str = "a slow place"
    installed: None = None

    def fetch(self, files: tuple[File, ...], target: Path) -> None:
        _note(self.folder, "fetched")
        time.sleep(1.5)
        for file in files:
            with atomic_write(target / file.name) as temporary:
                temporary.write_bytes((self.folder / file.name).read_bytes())


def _note(folder: Path, what: str) -> None:
    with (folder / "notes.txt").open("a") as file:
        file.write(f"{what}\n")


def fetching(folder: Path, machines: int) -> None:
    """Load CelebA, whose files are in a folder, by a slow route in each process, on as many machines with a cache each."""
    run_command(lambda: _fetching(folder, machines))


def _fetching(folder: Path, machines: int) -> None:
    distributed.WAIT, distributed._BEAT = timedelta(seconds=1), 0.1
    rank = int(os.environ["RANK"])
    os.environ["GLF_FAST_CACHE"] = str(folder / f"cache of {rank % machines}")
    digests = [f"md5:{file_digest(folder / file.name, 'md5')}" for file in celeba.CELEBA.files]
    files = tuple(replace(file, digest=digest) for file, digest in zip(celeba.CELEBA.files, digests, strict=True))
    source, decode = replace(celeba.CELEBA, files=files, routes=(_Slow(folder),)), celeba._decode

    def decoding(*arguments: Any) -> None:
        _note(folder, "decoded")
        decode(*arguments)

    with (
        distributed.launched(),
        mock.patch.dict(SOURCES, celeba=source),
        mock.patch.object(celeba, "_decode", decoding),
    ):
        train, test = load_splits(DataConfig("celeba"), None)
        assert (len(train), len(test)) == (4, 2) and distributed.highest(rank) == [1]


def long_work() -> None:
    """Work of process 0 that takes longer than processes wait for each other."""
    distributed.WAIT, distributed._BEAT = timedelta(seconds=0.5), 0.1
    with distributed.launched():
        assert distributed.by_main(lambda: time.sleep(1.5) or "done")() == "done"


def impatient(seconds: float, module: str, *arguments: str) -> None:
    """`python -m glf_fast.{module} …`, which waits for other processes for so many seconds, over a network that is slow."""
    distributed.WAIT = timedelta(seconds=seconds)
    with mock.patch.object(distributed, "all_reduce_seconds", return_value=60.0):
        forked.command(module, *arguments)


def leaving() -> None:
    """Leave a step of training by SystemExit; what has been wrapped is freed before the process group is."""
    wrapped = []

    def step() -> None:
        one = trainer("glf")
        one.step(one.inputs()[:6].float())
        wrapped.extend(map(weakref.ref, one._losses.values()))
        sys.exit()

    def destroy() -> None:
        assert wrapped and not any(reference() for reference in wrapped)
        print("freed")
        destroy_process_group()

    destroy_process_group = dist.destroy_process_group
    with mock.patch.object(dist, "destroy_process_group", destroy), distributed.launched():
        step()


def agreeing(folder: Path) -> None:
    """Look for the checkpoint "last" in a folder of each process: the second finds the first one's late, then another."""
    os.chdir(folder / os.environ["RANK"])
    run_command(lambda: _agreeing(folder))


def _agreeing(folder: Path) -> None:
    place = Path("last")
    with distributed.launched(), mock.patch.object(checkpoint, "_LATE", 20.0):
        checkpoint.await_same(Path("none yet"))
        late = threading.Timer(0.5, shutil.copy, (folder / "0" / place / "checkpoint.json", place))
        if not distributed.is_main():
            late.start()
        checkpoint.await_same(place)
        print("the same")
        checkpoint._LATE = 0.1
        (folder / "1" / place / "checkpoint.json").write_text("another")
        checkpoint.await_same(place)
