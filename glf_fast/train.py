"""python -m glf_fast.train [--preset NAME] [--config FILE …] [--flow.steps 12 …]: train a generative model of images.

From here one reads what a run does, top to bottom; what a step does is in `trainer`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from glf_fast import checkpoint, data, report, runs, seeds
from glf_fast.command_line import parse_train, pick_device
from glf_fast.config import Config
from glf_fast.config_files import to_toml
from glf_fast.dry_run import dry_run
from glf_fast.errors import UserError, run_command
from glf_fast.evaluate import evaluate, load_extractors, table
from glf_fast.pictures import draw_pictures, latest_picture, picture_name, save_picture
from glf_fast.progress import Progress, stop_on_signals
from glf_fast.trainer import LossLog, Trainer

__all__ = ["Run", "main"]

# Seeds of the noise behind scores: the final one is not the one by which the best checkpoint was chosen.
_PERIODIC_SEED, _FINAL_SEED = 1, 0


def main() -> None:
    """The command."""
    command = parse_train(sys.argv[1:])
    config = command.config
    if command.print_config:
        print(to_toml(config), end="")
        return
    device = pick_device(command.device)
    if device.type == "cpu":
        print(f"training on the CPU ({torch.get_num_threads()} threads)", file=sys.stderr)
    train, test = (
        data.as_images(
            data.load(config.data.source, split, data_dir=command.data_dir, image_size=config.data.image_size)
        )
        for split in data.SPLITS
    )
    for images, least in ((train, 4), (test, 2)):  # halves of them are compared, and a covariance needs two
        if len(images.images) < least:
            raise UserError(
                f"{config.data.source} has {len(images.images)} {images.split} images; {least} are the least"
            )
    if command.dry_run:
        dry_run(config, train, test, device)
        return
    label = command.files[-1].stem if command.files else command.preset or "quick"
    folder = command.out or runs.default_folder(config, command.base, label)
    runs.check_folder(folder, config)
    run = Run(folder, config, train, test, device)  # before anything is written: this finds what cannot be run
    runs.write_config(folder, config)
    with runs.lock(folder):
        run.resume()
        if run.finished:
            print(f"{folder} is finished ({run.trainer.images:,} images)", file=sys.stderr)
        else:
            with SummaryWriter(str(folder / "tensorboard"), purge_step=run.trainer.images) as board:
                run.train(board)
                run.finish(board)
    run.tell()


class Run:
    """A run in its folder; `resume` brings it to where it was left."""

    def __init__(
        self, folder: Path, config: Config, train: data.ImageDataset, test: data.ImageDataset, device: torch.device
    ) -> None:
        self.folder, self.config, self.device = folder, config, device
        self.train_set, self.test_set = train, test
        self.trainer = Trainer(config, train, device)
        self.images_per_epoch = self.trainer.images_per_epoch
        self.last, self.best = (runs.checkpoint_folder(folder, which) for which in ("last", "best"))
        self.extractors = load_extractors(config.score.extractors, device)
        self.minutes_before, self.started = 0.0, time.monotonic()

    def resume(self) -> None:
        """Go to the last checkpoint, if there is one; raises UserError where it is corrupt or of other images."""
        if checkpoint.exists(self.last):
            state = self.trainer.restore(self.last)
            if state["data"] != self.train_set.fingerprint:
                raise UserError(
                    f"{self.folder} was trained on other images of {self.train_set.name} than are there now; "
                    "choose another --out"
                )
            self.minutes_before = state["minutes"]
        self.started = time.monotonic()

    # -- how far ----------------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> float:
        """Passes over the training images so far."""
        return self.trainer.images / self.images_per_epoch

    @property
    def minutes(self) -> float:
        """Of training so far, over all resumes."""
        return self.minutes_before + (time.monotonic() - self.started) / 60

    @property
    def done(self) -> bool:
        """Whether there is nothing left to train."""
        limit = self.config.max_minutes
        return self.epoch >= self.config.epochs or (limit > 0 and self.minutes >= limit)

    @property
    def finished(self) -> bool:
        """Whether this is trained to the end, and the final scores are there."""
        records = runs.read_metrics(self.folder)
        scored = bool(runs.read_scores(self.folder))
        return self.done and scored and any(r.get("finished") and r["images"] == self.trainer.images for r in records)

    # -- training ---------------------------------------------------------------------------------------------------------

    def train(self, board: SummaryWriter) -> None:
        """Steps, with log, pictures, scores and checkpoints in between; ends the process when a signal asks for it."""
        trainer, config = self.trainer, self.config
        how = f"going on after {trainer.images:,} images" if trainer.images else "a new run"
        print(f"{self.folder}: {how}, up to {config.epochs * self.images_per_epoch:,} images", file=sys.stderr)
        runs.cut_metrics(self.folder, trainer.images)
        # The whole set is one uint8 tensor on the device: no worker processes, no copies, no waiting.
        images, order = self.train_set.images.to(self.device), torch.empty(0)
        losses, saved, stopping = LossLog(), time.monotonic(), self.done
        with (
            stop_on_signals() as stop,
            Progress(config.epochs * self.images_per_epoch, trainer.images, self.images_per_epoch) as progress,
        ):
            while not stopping:
                epoch, position = divmod(trainer.images, self.images_per_epoch)
                if position == 0 or not len(order):
                    shuffle = seeds.generator(config.seed, "order", epoch)
                    order = torch.randperm(len(images), generator=shuffle).to(self.device)
                losses.add(trainer.step(images[order[position : position + config.batch_size]]))

                stopping = bool(stop.signal) or self.done
                saving = stopping or time.monotonic() - saved >= 60 * config.checkpoint_minutes
                epoch_ends = trainer.images % self.images_per_epoch == 0
                if losses.full or epoch_ends or saving:
                    means = losses.flush(trainer.images, config.batch_size, self.last)
                    progress.update(trainer.images, means)
                    self._log(board, {**means, "images_per_second": progress.speed})
                if epoch_ends and (epoch + 1) % config.pictures_every == 0:
                    self._pictures(board)
                if epoch_ends and config.score.every and (epoch + 1) % config.score.every == 0:
                    progress.say(self._score(board))
                if saving:  # last, so that a run resumed from here misses nothing of this step
                    trainer.save(self.last, self._state(), for_resuming=True)
                    saved = time.monotonic()
                if epoch_ends or saving:
                    progress.pause()
        if stop.signal:
            if latest_picture(self.folder, "samples") is None:
                self._pictures(board)
            report.write(self.folder)
            print(f"stopped after {trainer.images:,} images; the same command goes on from here", file=sys.stderr)
            sys.exit(128 + stop.signal)

    def finish(self, board: SummaryWriter) -> None:
        """The final scores, of the best checkpoint and by all extractors, and the report."""
        images = self.trainer.images
        if not self.config.score.every:
            self.trainer.save(self.best, self._state(), for_resuming=False)
        elif not any("score" in record and record["images"] == images for record in runs.read_metrics(self.folder)):
            print(self._score(board), file=sys.stderr)
        if not (self.folder / "samples" / picture_name(images)).is_file():
            self._pictures(board)
        print("final scores, of the best checkpoint", file=sys.stderr)
        model, state = checkpoint.load_model(self.best, self.device)
        scores = evaluate(
            model,
            self.train_set,
            self.test_set,
            self.extractors,
            n=self.config.score.samples,
            seed=_FINAL_SEED,
            about={"name": "best", "images": state["images"], "epoch": state["epoch"], "ema": self.config.ema},
        )
        runs.write_scores(self.folder, scores)
        runs.append_metrics(self.folder, {"images": images, "epoch": self.epoch, "finished": True})
        report.write(self.folder)

    def tell(self) -> None:
        """Print the scores, and where to look."""
        print(table([score for score in runs.read_scores(self.folder) if score["checkpoint"]["name"] == "best"]))
        print(f"\nlook at   {self.folder / 'report.html'}\n          {latest_picture(self.folder, 'samples')}")
        print(f"more      python -m glf_fast.sample {self.folder} --n 64 --out samples.png")

    # -- what happens in between ------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "minutes": self.minutes, "data": self.train_set.fingerprint}

    def _log(self, board: SummaryWriter, values: dict[str, float]) -> None:
        for group in self.trainer.optimizer.param_groups:
            values[f"lr_{group['name']}"] = group["lr"]
        runs.append_metrics(self.folder, {"images": self.trainer.images, "epoch": self.epoch, **values})
        for name, value in values.items():
            board.add_scalar(name, value, self.trainer.images)

    def _pictures(self, board: SummaryWriter) -> None:
        trainer = self.trainer
        pictures = draw_pictures(trainer.best_model, self.test_set.images.to(self.device), self.config.seed)
        for kind, picture in pictures.items():
            save_picture(self.folder, kind, picture, trainer.images)
            board.add_image(kind, picture, trainer.images)

    def _score(self, board: SummaryWriter) -> str:
        """Score by the first extractor, keep the checkpoint if it is the best so far; returns a line that tells it."""
        trainer, state = self.trainer, self._state()
        [result] = evaluate(
            trainer.best_model,
            self.train_set,
            self.test_set,
            self.extractors[:1],
            n=self.config.score.samples,
            seed=_PERIODIC_SEED,
        )
        samples, rebuilt = result["samples"], result["reconstructions"]
        score = {"metric": samples["metric"], "value": samples["value"], "reconstructions": rebuilt["value"]}
        runs.append_metrics(self.folder, {"images": trainer.images, "epoch": self.epoch, "score": score})
        board.add_scalar(f"{score['metric']} of samples", score["value"], trainer.images)
        board.add_scalar(f"{score['metric']} of reconstructions", score["reconstructions"], trainer.images)
        before = checkpoint.read_state(self.best).get("score") if checkpoint.exists(self.best) else None
        best = before is None or before["metric"] != score["metric"] or score["value"] < before["value"]
        if best:
            trainer.save(self.best, {**state, "score": score}, for_resuming=False)
        report.write(self.folder)
        return (
            f"epoch {self.epoch:.4g}: {score['metric']} {score['value']:.2f} (reconstructions {score['reconstructions']:.2f})"
            + ("  best so far" if best else "")
        )


if __name__ == "__main__":
    run_command(main)
