"""A training run in its folder: training with log, pictures, scores and checkpoints, and the final scores."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from glf_fast import distributed, seeds
from glf_fast.data import CONTENTS, Dataset
from glf_fast.distributed import by_main, highest
from glf_fast.errors import UserError
from glf_fast.files import lock
from glf_fast.progress import Progress, Stop, stop_on_signals
from glf_fast.training import checkpoint, parallel, report, runs
from glf_fast.training.board import Board
from glf_fast.training.config import Config
from glf_fast.training.loss_log import LossLog
from glf_fast.training.pictures import latest_picture, picture_name, save_picture, saved_pictures
from glf_fast.training.showing import showing
from glf_fast.training.trainer import Trainer

__all__ = ["Run", "train_folder"]

# Seeds of the noise for scores. They differ, so that the final score is not biased by the choice of the best checkpoint.
_PERIODIC_SEED, _FINAL_SEED = 1, 0


def train_folder(
    folder: Path,
    config: Config,
    train: Dataset,
    test: Dataset,
    device: torch.device,
    *,
    local_batch_norm: bool = False,
) -> Run:
    """Train the run in a folder to its end, from where it was left, and return it. Of a finished run the report is written.

    Args:
        local_batch_norm: of several processes, each normalises its part of a batch by itself.

    Raises:
        UserError: the folder holds another run, or another process trains in it; training diverged.
        SystemExit: a signal stopped training, with a checkpoint.
    """
    # Before anything is written: what is refused leaves nothing behind.
    runs.check_folder(folder, config)
    run = Run(folder, config, train, test, device, local_batch_norm=local_batch_norm)
    with contextlib.ExitStack() as stack:
        by_main(stack.enter_context)(lock(folder))
        runs.check_folder(folder, config)  # which another process may have begun meanwhile
        run.resume()
        runs.sweep(folder)  # once the last checkpoint has been read and found whole
        runs.write_config(folder, config)
        if by_main(lambda: run.finished)():
            print(f"{folder} is finished ({run.trainer.images:,} images)", file=sys.stderr)
            report.write(folder)  # which a kill may have prevented
        else:
            with Board(folder / "tensorboard", run.trainer.images) as board:
                run.train(board)
                run.finish(board)
    return run


class Run:
    """A training run in its folder: `resume` restores the last checkpoint, `train` trains, `finish` computes the final scores.

    `showing` says which scores and pictures there are; runs on data without any have a log, checkpoints and a report.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        train: Dataset,
        test: Dataset,
        device: torch.device,
        *,
        local_batch_norm: bool = False,
    ) -> None:
        self.folder, self.config, self.device = folder, config, device
        self.train_set, self.test_set = train, test
        self.trainer = Trainer(config, train, device, local_batch_norm=local_batch_norm)
        self.images_per_epoch, self.total = self.trainer.images_per_epoch, self.trainer.ends[-1]
        if config.max_minutes and len(self.trainer.ends) > 1:
            raise UserError(
                f"model {config.model.name!r} trains in {len(self.trainer.ends)} stages, and a time limit may end training "
                "before the last stage; leave --max-minutes out and lower --epochs"
            )
        self.last, self.best = (runs.checkpoint_folder(folder, which) for which in ("last", "best"))
        self.showing = showing(train, test, config.score, device)
        self.items = self.showing.items if self.showing else "items"
        self.minutes_before, self.started = 0.0, time.monotonic()
        self._in_time = True  # as all processes agree

    def resume(self) -> None:
        """Restore the last checkpoint, if there is one; every process reads it.

        Raises:
            UserError: it is corrupt, or not the same in all processes, or was trained on other data.
        """
        checkpoint.await_same(self.last)
        if checkpoint.exists(self.last):
            state = self.trainer.restore(self.last)
            checkpoint.check_state(self.last, state)
            if self.trainer.images > self.total:
                done = self.trainer.images / self.images_per_epoch
                raise UserError(f"{self.folder} has trained for {done:.4g} epochs already; ask for as many, or more")
            if state["data"] != self.train_set.fingerprint or state.get("labels", "") != self.trainer.labels_digest:
                raise UserError(
                    f"{self.folder} was trained on other data{' or labels' * bool(self.trainer.labels_digest)} than "
                    f"{self.train_set.name} holds now; choose another --out, or restore the data"
                )
            self.minutes_before = state["minutes"]
        self.started = time.monotonic()
        [late] = highest(not self._has_time())
        self._in_time = not late

    # -- progress ---------------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> float:
        """Passes over the training data so far."""
        return self.trainer.images / self.images_per_epoch

    @property
    def minutes(self) -> float:
        """Minutes of training so far, over all resumes."""
        return self.minutes_before + (time.monotonic() - self.started) / 60

    @property
    def done(self) -> bool:
        """Whether there is nothing left to train."""
        return (self.trainer.in_last_stage and self.trainer.images >= self.total) or not self._in_time

    def _has_time(self) -> bool:
        return not 0 < self.config.max_minutes <= self.minutes

    @property
    def finished(self) -> bool:
        """Whether training is over and the final scores are written."""
        records = runs.read_metrics(self.folder)
        scored = not self.showing or (bool(found := runs.read_scores(self.folder)) and self.showing.complete(found))
        return self.done and scored and any(r.get("finished") and r["images"] == self.trainer.images for r in records)

    # -- training ---------------------------------------------------------------------------------------------------------

    def train(self, board: Board) -> None:
        """Train all stages; exit the process, with a checkpoint, when a signal asks for a stop."""
        trainer = self.trainer
        how = f"resuming after {trainer.images:,} {self.items}" if trainer.images else "starting a new run"
        print(f"{self.folder}: {how}, training up to {self.total:,} {self.items}", file=sys.stderr)
        runs.cut_metrics(self.folder, trainer.images)
        progress = Progress(self.total, trainer.images, self.images_per_epoch, self.items)
        with stop_on_signals(signal.SIGINT, signal.SIGTERM) as stop, progress:
            self._train_stage(board, progress, stop)
            while not (_agreed(stop) or self.done):
                trainer.advance()
                trainer.save(self.last, self._state(), for_resuming=True)
                progress.say(f"stage {trainer.stage + 1} of {len(trainer.ends)}")
                self._train_stage(board, progress, stop)
        if asked := _agreed(stop):
            if by_main(latest_picture)(self.folder, "samples") is None:
                self._pictures(board)
            report.write(self.folder)
            print(
                f"stopped after {trainer.images:,} {self.items}; run the same command again to resume", file=sys.stderr
            )
            sys.exit(128 + asked)

    def _train_stage(self, board: Board, progress: Progress, stop: Stop) -> None:
        """Train to the end of the stage, with log, pictures, scores and checkpoints in between."""
        trainer, config = self.trainer, self.config
        end = trainer.ends[trainer.stage]
        if self.done or trainer.images >= end:
            return
        inputs, order = trainer.inputs(), torch.empty(0)
        losses, saved, stopping, told = LossLog(trainer.remedy), time.monotonic(), False, False
        while not stopping:
            epoch, position = divmod(trainer.images, self.images_per_epoch)
            if position == 0 or not len(order):
                shuffle = seeds.generator(config.seed, "order", epoch)
                order = torch.randperm(len(inputs), generator=shuffle).to(self.device)
            index = trainer.share(order[position : position + config.batch_size])
            losses.add(trainer.step(inputs[index], index))

            due = time.monotonic() - saved >= 60 * config.checkpoint_minutes
            asked, late, soon = highest(stop.signal, not self._has_time(), due)
            self._in_time = not late
            stopping = bool(asked) or self.done or trainer.images >= end
            saving = stopping or bool(soon)
            epoch_ends = trainer.images % self.images_per_epoch == 0
            if losses.full or epoch_ends or saving:
                means = losses.flush(trainer.images, config.batch_size, self.last)
                curves = trainer.model.words.curves or means
                progress.update(trainer.images, {name: means[name] for name in curves if name in means})
                self._log(board, {**means, "images_per_second": progress.speed})
                if distributed.size() > 1 and not told:
                    told = True
                    step = config.batch_size / progress.speed
                    if line := parallel.communication(trainer.model, trainer.stage, self.device, step):
                        progress.say(line)
                    progress.pause()
            if epoch_ends and (epoch + 1) % config.pictures_every == 0:
                self._pictures(board)
            if epoch_ends and self._scores_after(epoch + 1):
                progress.say(self._score(board))
            if saving:  # last, so that the checkpoint comes after everything that this step writes
                trainer.save(self.last, self._state(), for_resuming=True)
                saved = time.monotonic()
            if epoch_ends or saving:
                progress.pause()

    def finish(self, board: Board) -> None:
        """Compute the final scores of the best checkpoint by all extractors, and write the report."""
        images = self.trainer.images
        if not (self.config.score.every and self.showing):
            self.trainer.save(self.best, self._state(), for_resuming=False)
        elif not by_main(self._is_scored)():
            print(self._score(board), file=sys.stderr)
        if not by_main(self._has_samples)():
            self._pictures(board)
        if self.showing:
            print("computing the final scores of the best checkpoint", file=sys.stderr)
            model, state = checkpoint.load_model(self.best, self.device)
            about = {"name": "best", "images": state["images"], "epoch": state["epoch"], "ema": self.config.ema}
            runs.write_scores(self.folder, self.showing.evaluate(model, _FINAL_SEED, about, final=True))
        runs.append_metrics(self.folder, {"images": images, "epoch": self.epoch, "finished": True})
        report.write(self.folder)

    @by_main
    def print_summary(self) -> None:
        """Print the scores and the paths of the report and of the latest samples."""
        if not self.showing:
            print(f"no scores: {self.train_set.name} holds {CONTENTS[self.train_set.kind]}, which have no scores")
            print(f"\nreport    {self.folder / 'report.html'}")
            return
        about = {"name": "best", "images": checkpoint.read_state(self.best)["images"]}
        scores = [s for s in runs.read_scores(self.folder) if about.items() <= s["checkpoint"].items()]
        print(self.showing.table(scores))
        print(f"\nreport    {self.folder / 'report.html'}\nsamples   {latest_picture(self.folder, 'samples')}")
        print(f"more      python -m glf_fast.sample {shlex.quote(str(self.folder))} --n 64")

    # -- log, pictures and scores -----------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        labels = {"labels": digest} if (digest := self.trainer.labels_digest) else {}
        return {"epoch": self.epoch, "minutes": self.minutes, "data": self.train_set.fingerprint, **labels}

    def _log(self, board: Board, values: dict[str, float]) -> None:
        for name, optimizer in self.trainer.optimizers.items():
            values[f"lr_{name}"] = optimizer.param_groups[0]["lr"]
        runs.append_metrics(self.folder, {"images": self.trainer.images, "epoch": self.epoch, **values})
        for name, value in values.items():
            board.scalar(name, value, self.trainer.images)

    @by_main
    def _pictures(self, board: Board) -> None:
        trainer = self.trainer
        if not self.showing:
            return
        pictures = dict(self.showing.pictures(trainer.best_model, self.config.seed))
        if not trainer.in_last_stage:
            for kind in ("samples", "classes"):  # which mean nothing yet
                pictures.pop(kind, None)
        # Samples last: `finish` takes them for a sign that all pictures are there, even after a kill.
        for kind, picture in reversed(pictures.items()):
            save_picture(self.folder, kind, picture, trainer.images)
            if not isinstance(picture, str):
                board.image(kind, picture, trainer.images)

    def _has_samples(self) -> bool:
        """Whether there are pictures of samples of the present weights."""
        name = Path(picture_name(self.trainer.images)).stem
        return any(path.stem == name for path in saved_pictures(self.folder, "samples"))

    def _scores_after(self, epoch: int) -> bool:
        """Whether there is a score after `epoch` epochs. Before the last stage samples are meaningless."""
        every = self.config.score.every
        return self.showing is not None and self.trainer.in_last_stage and every > 0 and epoch % every == 0

    def _score(self, board: Board) -> str:
        """Score the model, save the checkpoint if its score is the best so far, and return a line to print."""
        trainer, state = self.trainer, self._state()
        assert self.showing is not None
        [result] = self.showing.evaluate(trainer.best_model, _PERIODIC_SEED, final=False)
        score, curves, told = self.showing.summary(result)
        for name, value in curves.items():
            board.scalar(name, value, trainer.images)
        line = f"epoch {self.epoch:.4g}: {told}"
        best = by_main(self._is_best)(score)
        if best:
            trainer.save(self.best, {**state, "score": score}, for_resuming=False)
        # Last: a score in the log says that the best checkpoint is right, even to a process that goes on after a kill.
        runs.append_metrics(self.folder, {"images": trainer.images, "epoch": self.epoch, "score": score})
        report.write(self.folder)
        return line + ("  best so far" if best else "")

    def _is_scored(self) -> bool:
        """Whether the log has a score of the present weights."""
        images = self.trainer.images
        return any("score" in record and record["images"] == images for record in runs.read_metrics(self.folder))

    def _is_best(self, score: dict[str, Any]) -> bool:
        before = checkpoint.read_state(self.best).get("score") if checkpoint.exists(self.best) else None
        return before is None or before["metric"] != score["metric"] or score["value"] < before["value"]


def _agreed(stop: Stop) -> int:
    """The signal that has asked one of the processes for a stop; 0 if there was none."""
    [asked] = highest(stop.signal)
    if asked:
        stop.signal = asked
    return asked
