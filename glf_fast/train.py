"""python -m glf_fast.train [--preset NAME] [--config FILE …] [--flow.steps 12 …]: train a generative model.

`training.run` contains a run from its first step to its report; docs/architecture.md follows a batch through it.
"""

from __future__ import annotations

import sys

import torch

from glf_fast import distributed
from glf_fast.command_line import pick_device
from glf_fast.errors import check_text, run_command
from glf_fast.output import one_line
from glf_fast.training import runs
from glf_fast.training.arguments import parse_train
from glf_fast.training.config_files import to_toml
from glf_fast.training.dry_run import dry_run
from glf_fast.training.run import train_folder
from glf_fast.training.splits import load_splits


def main() -> None:
    """Run the command."""
    with distributed.launched():
        _train()


def _train() -> None:
    command = parse_train(sys.argv[1:])
    config, device = command.config, pick_device(command.device)
    if command.print_config:
        print(to_toml(config), end="")
        return
    if distributed.together():
        count, each = distributed.size(), config.batch_size / distributed.size()
        print(f"{count} processes, each with {each:g} of the {config.batch_size} images of a step", file=sys.stderr)
    if device.type == "cpu":
        print(f"training on the CPU ({torch.get_num_threads()} threads)", file=sys.stderr)
    train, test = load_splits(config.data, command.data_dir)
    split = f" ({one_line(test.policy)})" if test.policy else ""
    print(f"{config.data.source}: {len(train):,} training and {len(test):,} test items{split}", file=sys.stderr)
    if command.dry_run:
        dry_run(config, train, test, device)
        return
    folder = command.out or runs.default_folder(config, command.base, command.label)
    for path in (folder, folder.resolve().name):  # TensorBoard needs the one, the report shows the other
        check_text("--out", str(path))
    train_folder(folder, config, train, test, device, local_batch_norm=command.local_batch_norm).print_summary()


if __name__ == "__main__":
    run_command(main)
