"""python -m glf_fast.train [--preset NAME] [--config FILE …] [--flow.steps 12 …]: train a generative model.

`training.run` contains a run from its first step to its report; docs/architecture.md follows a batch through it.
"""

from __future__ import annotations

import sys

import torch
from torch.utils.tensorboard import SummaryWriter

from glf_fast import data
from glf_fast.command_line import pick_device
from glf_fast.errors import UserError, run_command
from glf_fast.training import runs
from glf_fast.training.arguments import parse_train
from glf_fast.training.config_files import to_toml
from glf_fast.training.dry_run import dry_run
from glf_fast.training.run import Run


def main() -> None:
    """Run the command."""
    command = parse_train(sys.argv[1:])
    config = command.config
    if command.print_config:
        print(to_toml(config), end="")
        return
    device = pick_device(command.device)
    if device.type == "cpu":
        print(f"training on the CPU ({torch.get_num_threads()} threads)", file=sys.stderr)
    train, test = (
        data.load(config.data.source, split, data_dir=command.data_dir, image_size=config.data.image_size)
        for split in data.SPLITS
    )
    for dataset, least in ((train, 4), (test, 2)):  # scores compare two halves of train; a covariance needs two items
        if len(dataset) < least:
            raise UserError(
                f"{config.data.source} has {len(dataset)} {dataset.split} items; at least {least} are needed"
            )
    if command.dry_run:
        dry_run(config, train, test, device)
        return
    label = command.files[-1].stem if command.files else command.preset or "quick"
    folder = command.out or runs.default_folder(config, command.base, label)
    runs.check_folder(folder, config)
    run = Run(
        folder, config, train, test, device
    )  # before anything is written, because Run refuses impossible settings
    runs.write_config(folder, config)
    with runs.lock(folder):
        run.resume()
        if run.finished:
            print(f"{folder} is finished ({run.trainer.images:,} images)", file=sys.stderr)
        else:
            with SummaryWriter(str(folder / "tensorboard"), purge_step=run.trainer.images) as board:
                run.train(board)
                run.finish(board)
    run.print_summary()


if __name__ == "__main__":
    run_command(main)
