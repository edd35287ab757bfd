"""One run of `python -m glf_fast.fit`: from a table to a folder with a density and its report.

config.json and model.safetensors (the density)  result.json  report.html  progress.fit (from which a run resumes)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from glf_fast import seeds
from glf_fast.errors import UserError
from glf_fast.files import lock, write_json
from glf_fast.fitting import FitResult, fit
from glf_fast.models.flow_settings import FlowSettings
from glf_fast.models.saving import CONFIG_FILE
from glf_fast.settings import check, table
from glf_fast.tabular import report
from glf_fast.tabular.columns import encoded
from glf_fast.tabular.density import TableDensity
from glf_fast.tabular.evaluation import Evaluation, evaluate
from glf_fast.tabular.preparation import Options, Prepared, prepare

__all__ = ["Training", "fit_table"]

PROGRESS = "progress.fit"


@dataclass(frozen=True)
class Training:
    """How a density is trained; None for what depends on the number of rows.

    Attributes:
        epochs: passes over the rows at most; None: as many as make 5,000 steps, and at least 50.
        batch_size: rows of a step; None: an eighth of the rows, at most 256.
        lr: learning rate at the start, from which it falls to 0 along half a cosine.
        patience: epochs without a better validation loss; None: a fifth of all, and at least 10.
        seed: random seed.
    """

    epochs: int | None = None
    batch_size: int | None = None
    lr: float = 1e-3
    patience: int | None = None
    seed: int = 0

    def for_rows(self, n: int) -> dict[str, Any]:
        """The arguments of `glf_fast.fit` for n rows to train on."""
        batch_size = max(1, min(256, n // 8)) if self.batch_size is None else self.batch_size
        if batch_size > n:
            raise UserError(f"--batch-size {batch_size} is larger than the {n} rows to train on")
        epochs = max(50, -(-5000 // (n // batch_size))) if self.epochs is None else self.epochs
        patience = max(10, epochs // 5) if self.patience is None else self.patience
        return {
            "epochs": epochs, "batch_size": batch_size, "lr": self.lr, "patience": patience, "seed": self.seed,
            "schedule": "cosine", "clip": 10.0,
        }  # fmt: skip


def fit_table(
    source: Path,
    folder: Path,
    options: Options,
    settings: FlowSettings,
    training: Training,
    device: torch.device,
    say: Callable[[str], None],
) -> tuple[Evaluation, FitResult]:
    """Fit a density to a table, and write its folder. The same call resumes a run that was interrupted.

    Raises:
        UserError: what is wrong with the table, the options or the folder.
        KeyboardInterrupt: after Ctrl-C, once the file to resume from is written.
    """
    began = time.perf_counter()
    check(settings, "flow.")
    _check_folder(folder)
    prepared = prepare(source, options, training.seed)
    for note in prepared.notes:
        say(note)
    density = _new_density(settings, prepared, training.seed)
    density.flow.to(device)
    arguments = training.for_rows(len(prepared.splits["train"]))
    with lock(folder):
        _check_folder(folder)
        read = time.perf_counter()
        result = _fit(density, prepared, arguments, folder / PROGRESS)
        if result.stopped == "interrupted":
            say(f"the same command goes on from {folder / PROGRESS}")
            raise KeyboardInterrupt
        fitted = time.perf_counter()
        density.save(folder)
        evaluation = evaluate(density, prepared, training.seed)
        for note in (found := evaluation.notes()):
            say(note)
        seconds = {"reading": read - began, "training": result.seconds, "evaluation": time.perf_counter() - fitted}
        record = {
            "source": str(source),
            "rows": {split: len(index) for split, index in prepared.splits.items()},
            **evaluation.table(density),
            "training": {
                **arguments,
                "steps": result.steps,
                "best_epoch": result.best_epoch,
                "stopped": result.stopped,
            },
            "flow": table(settings),
            "options": asdict(options),
            "notes": [*prepared.notes, *found],
            "seconds": seconds,
        }
        write_json(folder / "result.json", record)
        report.write(folder / "report.html", str(source), density, prepared, evaluation, result, record, training.seed)
    return evaluation, result


def _check_folder(folder: Path) -> None:
    """Raise UserError for a folder that holds something else."""
    if not folder.exists() or (folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir())):
        return
    if not folder.is_dir():
        raise UserError(f"--out {folder} is a file, not a folder; choose another name")
    if not (folder / PROGRESS).is_file():
        has = f"a density without its {PROGRESS}" if (folder / CONFIG_FILE).is_file() else "other files"
        raise UserError(f"{folder} holds {has}; choose another --out, or delete the folder")


def _new_density(settings: FlowSettings, prepared: Prepared, seed: int) -> TableDensity:
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(seeds.generator(seed, "weights").get_state())
        return TableDensity(settings, prepared.columns, prepared.context, prepared.table)


def _fit(density: TableDensity, prepared: Prepared, arguments: dict[str, Any], progress: Path) -> FitResult:
    parts = {}
    for split in ("train", "validation"):
        values, given = prepared.rows(split)
        z = torch.from_numpy(encoded(density.columns, values)[0])
        parts[split] = z, None if given is None else torch.from_numpy(encoded(density.context, given)[0])
    try:
        return fit(density.flow, *parts["train"], validation=parts["validation"], resume=progress, **arguments)
    except UserError as error:  # of the file of another run
        reason = str(error).partition(";")[0]
        raise UserError(f"{reason}; choose another --out, or delete the folder {progress.parent}") from error
    except FloatingPointError as error:
        raise UserError(f"training failed: {error} (--lr, --bounds)") from error
