"""Where a training run's time goes: python tools/profile_training.py --preset quick --epochs 1

Takes the options of `python -m glf_fast.train`, trains in a temporary folder without final scores, and prints the share of
the processor's time that each part of the loop took. For processors: on a GPU the parts only queue work.
"""

from __future__ import annotations

import platform
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from glf_fast import data
from glf_fast.errors import run_command
from glf_fast.training import runs
from glf_fast.training.arguments import parse_train
from glf_fast.training.run import Run


def main() -> None:
    """The command."""
    command = parse_train(sys.argv[1:])
    config = command.config
    train, test = (
        data.load(config.data.source, split, data_dir=command.data_dir, image_size=config.data.image_size)
        for split in data.SPLITS
    )
    seconds: dict[str, float] = defaultdict(float)

    def timed(owner: Any, method: str, part: str) -> None:
        inner: Callable[..., Any] = getattr(owner, method)

        def outer(*arguments: Any, **options: Any) -> Any:
            started = time.process_time()
            try:
                return inner(*arguments, **options)
            finally:
                seconds[part] += time.process_time() - started

        setattr(owner, method, outer)

    with tempfile.TemporaryDirectory() as folder:
        runs.write_config(Path(folder), config)
        run = Run(Path(folder), config, train, test, torch.device("cpu"))
        timed(run.trainer.model, "forward", "forward")
        timed(torch.Tensor, "backward", "backward")
        for optimizer in run.trainer.optimizers.values():
            timed(optimizer, "step", "optimizer")
        timed(run.trainer, "_update_average", "average")
        timed(run.trainer, "save", "checkpoints")
        timed(run, "_pictures", "pictures")
        timed(run, "_score", "scores")
        timed(run, "_log", "log")
        started = time.process_time()
        with SummaryWriter(folder) as board:
            run.train(board)
        total = time.process_time() - started
    seconds["the rest"] = total - sum(seconds.values())
    steps = run.trainer.images // config.batch_size
    print(f"{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(
        f"{steps} steps of {config.batch_size}, {total:.1f} s of processor time, {1000 * total / steps:.1f} ms a step"
    )
    for part, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"{part:12} {100 * spent / total:6.2f} %  {1000 * spent / steps:8.2f} ms a step")


def _processor() -> str:
    for line in (
        Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    ):
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


if __name__ == "__main__":
    run_command(main)
