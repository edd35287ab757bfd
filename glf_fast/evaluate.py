"""python -m glf_fast.evaluate RUN: Fréchet distances and other scores of a trained model, with their protocol."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from glf_fast import data, distributed, metrics
from glf_fast.command_line import parse, pick_device
from glf_fast.errors import UserError, run_command
from glf_fast.training import checkpoint, report, runs, sequence_scoring
from glf_fast.training.scoring import evaluate, load_extractors, other_likelihood, table
from glf_fast.training.sequence_scoring import evaluate_sequences
from glf_fast.training.splits import load_other, load_splits


@dataclass(frozen=True)
class Command:
    """Score a trained model against the test data of its data set."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""
    checkpoint: Literal["best", "last"] = "best"
    """Checkpoint of the run to use."""
    extractor: tuple[str, ...] = ()
    """Feature networks; by default the networks in the run's settings."""
    scores: str = ""
    """Scores, separated by commas: fd, kid, pr, is, prd, dc, msssim, critic, modes, nearest (docs/scores.md); by default those
    in the run's settings. They replace earlier scores of the same samples."""
    n: int | None = None
    """Number of samples; by default the number in the run's settings."""
    temperature: float = 1.0
    """Standard deviation of the noise."""
    seed: int = 0
    """Random seed of the samples."""
    mode: str = ""
    """Sampling mode of the model; empty for the usual one. A wrong name lists the modes of the model."""
    other_data: tuple[str, ...] = ()
    """Data sets whose bits per dimension are printed, too, for a model with a likelihood. Their images must have the shape of
    the run's; those of folders, zips and CelebA are resized to it."""
    data_dir: Path | None = None
    """Folder in which to look for the data set first."""
    device: str = ""
    """Device: cpu, cuda, cuda:1, …; by default cuda if there is a GPU."""


def main() -> None:
    """Run the command."""
    with distributed.launched():
        _evaluate()


def _evaluate() -> None:
    command = parse(Command, sys.argv[1:], "glf_fast.evaluate")
    config, device = runs.read_config(command.run), pick_device(command.device)
    scores = metrics.named_scores(command.scores) or config.score.scores
    if message := metrics.check_scores(scores, command.extractor or config.score.extractors):
        raise UserError(f"--scores: {message}")
    which = distributed.by_main(runs.pick_checkpoint)(command.run, command.checkpoint)
    model, state = checkpoint.load_model(runs.checkpoint_folder(command.run, which), device)
    checkpoint.check_state(runs.checkpoint_folder(command.run, which), state)
    train, test = load_splits(config.data, command.data_dir)
    if train.shape != model.shape or train.fingerprint != state["data"]:
        raise UserError(
            f"{config.data.source} holds other data than {command.run} was trained on; give the folder of the original data "
            "with --data-dir"
        )
    n = config.score.samples if command.n is None else command.n
    about = {"name": which, "images": state["images"], "epoch": state["epoch"], "ema": config.ema}
    if isinstance(train, data.TokenDataset) and isinstance(test, data.TokenDataset):
        of_sequences = evaluate_sequences(
            model, train, test, n=n, searches=config.score.searches, about=about, **_sequence_options(command)
        )
        _report(command.run, of_sequences, sequence_scoring.table(of_sequences))
        return
    train, test = data.as_images(train), data.as_images(test)
    others = []
    for source in command.other_data:  # first: what is refused costs no scores
        other = data.as_images(load_other(source, config.data, model.shape, command.data_dir))
        others.append(other_likelihood(model, test, other, n, seed=command.seed))
    results = evaluate(
        model,
        train,
        test,
        load_extractors(command.extractor or config.score.extractors, device, all_needed=bool(command.extractor)),
        n=n,
        seed=command.seed,
        temperature=command.temperature,
        mode=command.mode,
        about=about,
        scores=scores,
    )
    _report(command.run, results, "\n".join([table(results), *others]))


def _sequence_options(command: Command) -> dict[str, Any]:
    """The options of sampling; raises UserError for those that are for images alone."""
    for name in ("extractor", "other_data", "scores"):
        if getattr(command, name):
            raise UserError(f"--{name.replace('_', '-')} is for images, and this run is on sequences; leave it out")
    return {name: getattr(command, name) for name in ("seed", "temperature", "mode")}


def _report(run: Path, scores: list[dict[str, Any]], text: str) -> None:
    """Print and write scores, and the report."""
    print(text, flush=True)  # first: on a disk that is full or read-only they are not lost
    runs.write_scores(run, scores)
    report.write(run)
    print(f"\nscores    {run / 'scores.json'} (with their protocol)\nreport    {run / 'report.html'}")


if __name__ == "__main__":
    run_command(main)
