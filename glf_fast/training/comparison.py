"""A comparison of models: each row of a table is trained in run folders of its own, with shared data, settings and scores.

runs/{row}-seed-{seed}/   ordinary runs      pictures/   samples and reconstructions of each row
comparison.json  comparison.md  comparison.html          the results, by `comparison_page`
"""

from __future__ import annotations

import contextlib
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from glf_fast import models
from glf_fast.data import Dataset, as_images
from glf_fast.distributed import all_failed, by_main
from glf_fast.errors import UserError, lacks_memory
from glf_fast.files import atomic_write, lock, read_json
from glf_fast.images import grid, to_float, to_uint8
from glf_fast.metrics import subset
from glf_fast.models import GenerativeModel, Reconstructs
from glf_fast.output import one_line
from glf_fast.training import checkpoint, comparison_page, runs
from glf_fast.training.comparison_plan import Plan, row_file, rows, shared_files
from glf_fast.training.dry_run import preview
from glf_fast.training.pictures import draw
from glf_fast.training.run import train_folder
from glf_fast.training.scoring import evaluate_mode, has_scores, load_extractors

__all__ = ["PRIOR", "dry_run", "run"]

# A sampling mode that shows what a fitted density of codes is worth. Models that have it are scored in it, too.
PRIOR = "prior"
# The settings of the scores in the table, beside extractor, mode and number of samples.
_USUAL = {"seed": 0, "temperature": 1.0}
_SAMPLES, _REBUILT = 36, 10  # images in the pictures of a row
_HEIGHT = 64  # pixels to which small images are enlarged


def dry_run(plan: Plan, train: Dataset, device: torch.device) -> None:
    """Take two steps of each row, and print parameters, estimated time, folder and state; nothing is written."""
    plan.check_folder()
    total = 0.0
    for row in plan.rows:
        try:
            seen = preview(plan.config(row), train, device)
        except UserError as error:
            if not all_failed():
                raise
            print(f"{row:20} cannot be trained: {one_line(str(error))}")
            continue
        total += seen.minutes * plan.seeds
        print(
            f"{row:20} {sum(seen.parameters.values()):>12,} parameters  {seen.seconds:.3g} s a step, about "
            f"{seen.minutes:.3g} minutes  {plan.run_folder(row, 0)} ({_state(plan.run_folder(row, 0))['state']})"
        )
    print(f"about {total:.3g} minutes for {len(plan.wanted)} runs, without scores; nothing was written")


def run(plan: Plan, train: Dataset, test: Dataset, device: torch.device) -> dict[str, Any]:
    """Train what is not trained, write the results after each run, and return them.

    A run that fails is a line of the table with its reason, and the other runs are trained.

    Raises:
        UserError: the folder holds something else, or another process works in it.
        SystemExit: a signal stopped training, with a checkpoint.
    """
    plan.check_folder()
    with contextlib.ExitStack() as stack:
        by_main(stack.enter_context)(lock(plan.folder))
        plan.check_folder()  # which another process may have begun meanwhile
        by_main((plan.folder / "runs").mkdir)(exist_ok=True)
        results = _Results(plan, train, test, device)
        for number, (row, seed) in enumerate(plan.wanted, 1):
            seeds = f", seed {seed}" if plan.seeds > 1 else ""
            print(f"row {number} of {len(plan.wanted)}: {row}{seeds}", file=sys.stderr)
            with results.noting_failure(row, seed):
                train_folder(plan.run_folder(row, seed), plan.config(row, seed), train, test, device)
                results.add(row, seed)
            comparison_page.write(plan.folder, results.record())
        return results.record()


class _Results:
    """The results of the runs in the folder of a comparison, of the rows to train and of others.

    Only process 0 reads files, so that all processes decide alike.
    """

    def __init__(self, plan: Plan, train: Dataset, test: Dataset, device: torch.device) -> None:
        self.plan, self.train, self.test, self.device = plan, train, test, device
        self._rows: dict[str, dict[str, Any]] = {}
        self._runs: dict[tuple[str, int], dict[str, Any]] = {}
        self._floors: dict[str, tuple[str, dict[str, float]]] = {}  # by extractor: the metric and its floors
        self.of_images = train.kind == "images"
        if self.of_images:
            _save(plan.folder / "pictures" / "test.png", subset(test.items, _REBUILT), _REBUILT)
        present, before = by_main(_earlier)(plan)
        for row, seed in dict.fromkeys([*present, *before]):
            with self.noting_failure(row, seed):
                self.add(row, seed, before.get((row, seed), ""))

    @contextlib.contextmanager
    def noting_failure(self, row: str, seed: int) -> Iterator[None]:
        """Note the user's errors and a lack of memory inside the block as the result of this run.

        Of several processes all must have the error; the error of one ends them all, as if it had been killed.
        """
        try:
            yield
        except (UserError, MemoryError, RuntimeError) as error:
            if not (isinstance(error, UserError) or lacks_memory(error)) or not all_failed():
                raise
            reason = str(error) if isinstance(error, UserError) else "there is not enough memory for this model"
            print(f"{row} failed: {one_line(reason)}", file=sys.stderr)
            self._note(row, seed, "failed", one_line(reason))

    def _note(self, row: str, seed: int, state: str, reason: str = "", **more: Any) -> None:
        """Note the state of a run; without scores, it has none."""
        more = {"epoch": 0.0, "minutes": 0.0, "scores": [], "prior_scores": [], **more}
        folder = self.plan.run_folder(row, seed).relative_to(self.plan.folder).as_posix()
        self._runs[row, seed] = {"seed": seed, "folder": folder, "state": state, "reason": reason, **more}

    def add(self, row: str, seed: int, failure: str = "") -> None:
        """Read the results of a run, and draw the pictures of the row if this run is its first.

        Args:
            failure: the reason why the run failed before, if it did.
        """
        folder, config = self.plan.run_folder(row, seed), self.plan.config(row, seed)
        state = _state(folder)
        if state["state"] != "finished":
            reason = failure or f"trained for {state['epoch']:.3g} of {config.epochs} epochs so far"
            self._note(row, seed, reason=reason, **state | ({"state": "failed"} if failure else {}))
            return
        before = self._runs.get((row, seed), {})
        if before.get("state") == "finished" and has_scores(before["scores"], self.plan.shared.score.scores):
            return
        model, about = checkpoint.load_model(runs.checkpoint_folder(folder, "best"), self.device)
        if about["data"] != self.train.fingerprint:
            raise UserError(
                f"{folder} was trained on other data than {self.train.name} holds now; choose another --out, or restore "
                "the data"
            )
        wanted = {**_USUAL, "n": config.score.samples}
        scores = [
            score
            for score in by_main(runs.read_scores)(folder)
            if score["checkpoint"].get("name") == "best"
            and score["checkpoint"].get("images") == about["images"]
            and wanted.items() <= score["settings"].items()
        ]
        scores.sort(key=lambda score: self._order(score["settings"]["extractor"]))
        usual, prior = ([s for s in scores if s["settings"]["mode"] == mode] for mode in ("", PRIOR))
        if not usual:
            raise UserError(
                f"{folder} has no scores of its best checkpoint with {wanted['n']} samples; run python -m glf_fast.evaluate "
                f"{folder}, and this command again"
            )
        if self.of_images and not prior and _has_prior(model):  # by the first extractor alone, which the table is about
            print(f"{folder}: computing the score of samples from N(0, I)", file=sys.stderr)
            extractors = load_extractors([usual[0]["settings"]["extractor"]], self.device, all_needed=True)
            prior = evaluate_mode(model, as_images(self.train), as_images(self.test), extractors, usual[:1], PRIOR)
            runs.write_scores(folder, prior)
        for score in usual if self.of_images else ():
            self._floors[score["settings"]["extractor"]] = score["samples"]["metric"], score["samples"]["floors"]
        self._note(row, seed, **state, scores=usual, prior_scores=prior)
        first = min(s for r, s in self._runs if r == row and self._runs[r, s]["state"] == "finished")
        if seed == first:
            self._rows[row] = {"parameters": sum(p.numel() for p in model.parameters())}
            if self.of_images:  # scores of sequences have samples themselves
                self._draw(row, model)

    def _order(self, extractor: str) -> int:
        """The place of an extractor among those of the comparison: without its weights, a run may lack the first."""
        names = self.plan.shared.score.extractors
        return names.index(extractor) if extractor in names else len(names)

    def _draw(self, row: str, model: GenerativeModel) -> None:
        pictures = self.plan.folder / "pictures"
        _save(pictures / f"{row}-samples.png", draw(model, _SAMPLES, seed=0))
        if isinstance(model, Reconstructs):
            images = to_float(subset(self.test.items, _REBUILT).to(self.device))
            _save(pictures / f"{row}-reconstructions.png", to_uint8(model.reconstruct(images)), _REBUILT)

    def record(self) -> dict[str, Any]:
        """The results so far, JSON-ready; `comparison_page` describes them."""
        plan, shared = self.plan, self.plan.shared
        names = {row for row, _ in self._runs}
        return {
            "format": comparison_page.FORMAT,
            "data": {"name": self.train.name, "fingerprint": self.train.fingerprint, "source": plan.data},
            "size": plan.size,
            "epochs": shared.epochs,
            "batch_size": shared.batch_size,
            "samples": shared.score.samples,
            "kind": self.train.kind,
            "test_images": len(self.test),
            "extractors": list(shared.score.extractors),
            "scores": list(shared.score.scores),
            "versions": {
                "glf_fast": version("glf_fast"),
                "torch": version("torch"),
                "python": platform.python_version(),
            },
            "machine": _machine(self.device),
            "settings": {path.name: path.read_text(encoding="utf-8") for path in shared_files(plan.size, plan.data)},
            "floors": dict(self._floors[name] for name in sorted(self._floors, key=self._order)),
            "rows": [self._row(row) for row in rows(plan.kind) if row in names],
        }

    def _row(self, row: str) -> dict[str, Any]:
        config = self.plan.config(row)
        return {
            "name": row,
            "title": models.kind(config.model.name).words.title,
            "what": config.model.summary(),
            "settings": row_file(row, self.plan.kind).read_text(encoding="utf-8"),
            "parameters": None,
            **self._rows.get(row, {}),
            "runs": [self._runs[key] for key in sorted(self._runs) if key[0] == row],
        }


def _has_prior(model: GenerativeModel) -> bool:
    """Whether the model has samples from the prior beside its usual ones, and not the same ones, for want of a density."""
    if PRIOR not in model.sampling_modes:
        return False
    usual, prior = (draw(model, _SAMPLES, seed=0, mode=mode) for mode in ("", PRIOR))
    return not torch.equal(usual, prior)


@by_main
def _state(folder: Path) -> dict[str, Any]:
    """The state of a run ("new", "unfinished", "finished"), and the epochs and minutes of its training."""
    last = runs.checkpoint_folder(folder, "last")
    if not checkpoint.exists(last):
        return {"state": "new", "epoch": 0.0, "minutes": 0.0}
    state = checkpoint.read_state(last)
    checkpoint.check_state(last, state)
    ended = any(r.get("finished") and r["images"] == state["images"] for r in runs.read_metrics(folder))
    finished = ended and bool(runs.read_scores(folder))
    return {
        "state": "finished" if finished else "unfinished",
        "epoch": state["epoch"],
        "minutes": state["minutes"],
    }


def _earlier(plan: Plan) -> tuple[list[tuple[str, int]], dict[tuple[str, int], str]]:
    """Row and seed of the runs in the folder, and the reasons of those that failed before; other folders are named."""
    present = list(plan.present())
    known = {plan.run_folder(row, seed) for row, seed in present}
    for path in sorted((plan.folder / "runs").glob("*")):
        if path not in known and not path.name.startswith("."):
            print(f"{path} is not a run of a known row; it is left out of the table", file=sys.stderr)
    return present, _failures(plan)


def _failures(plan: Plan) -> dict[tuple[str, int], str]:
    """The reasons of the runs that failed in an earlier comparison in this folder, by row and seed."""
    path = plan.folder / comparison_page.JSON
    if not path.is_file():
        return {}
    try:
        before = read_json(path)
        known = [row for row in before["rows"] if row["name"] in rows(plan.kind)]
        failed = [(row["name"], run) for row in known for run in row["runs"] if run["state"] == "failed"]
        return {(row, int(run["seed"])): str(run["reason"]) for row, run in failed}
    except (UserError, KeyError, TypeError, ValueError):  # it is written again
        return {}


@by_main
def _save(path: Path, images: Tensor, columns: int | None = None) -> None:
    """Write a grid of uint8 images (N, C, H, W) as PNG; the ground is transparent, so that it suits light and dark pages."""
    picture = grid(images.cpu(), columns, padding=1)
    opaque = 255 - grid(torch.zeros_like(images[:, :1], device="cpu"), columns, padding=1)
    scale = max(1, _HEIGHT // images.shape[2])
    pixels = torch.cat([picture.expand(3, -1, -1), opaque]).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    with atomic_write(path) as temporary:
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(temporary, format="PNG")


def _machine(device: torch.device) -> str:
    """The processor or GPU on which the comparison runs."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = Path("/proc/cpuinfo")
    lines = names.read_text(encoding="utf-8", errors="replace").splitlines() if names.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    threads = torch.get_num_threads()
    return f"{name or platform.machine()}, {threads} thread{'s' * (threads > 1)}"
