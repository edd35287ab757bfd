"""Images per second of one process with all cores, and of one process for each core: python -m bench.several_processes

Runs of both kinds alternate, so that both meet the same load. A run takes some steps to settle, then times the others.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

import torch

from glf_fast import distributed
from glf_fast.training.config_files import load, preset_path
from glf_fast.training.splits import load_splits
from glf_fast.training.trainer import Trainer

_ROUNDS, _SETTLE, _STEPS = 3, 3, 10
_KINDS = ("one process", "a process per core", "a process per core, local batch norms")


def main() -> None:
    """Alternate, and print medians and ratios."""
    preset, cores = (sys.argv[1:] or ["quick"])[0], os.cpu_count() or 1
    speeds: dict[str, list[float]] = {kind: [] for kind in _KINDS}
    for _ in range(_ROUNDS):
        for kind, found in speeds.items():
            several = kind != _KINDS[0]
            launcher = ["torch.distributed.run", "--nproc-per-node", str(cores), "-m"] if several else []
            command = [sys.executable, "-m", *launcher, "bench.several_processes", preset, kind]
            threads = str(1 if several else cores)
            done = subprocess.run(
                command, env=os.environ | {"OMP_NUM_THREADS": threads}, capture_output=True, text=True, check=True
            )
            found.append(float(done.stdout.split()[-1]))
            print(f"{kind}: {found[-1]:,.0f} images/s", flush=True)
    first = speeds[_KINDS[0]]
    for kind, found in speeds.items():
        ratios = [b / a for a, b in zip(first, found, strict=True)]
        print(
            f"{preset}, {cores} cores, {kind}: median {statistics.median(found):,.0f} images/s, "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f}) times one process"
        )


def one_run(preset: str, kind: str) -> None:
    """Train for some steps, and print the images per second."""
    with distributed.launched():
        config = load(preset_path(preset))
        train, _ = load_splits(config.data, None)
        trainer = Trainer(config, train, torch.device("cpu"), local_batch_norm=kind == _KINDS[2])
        inputs, started = trainer.inputs(), 0.0
        for step in range(_SETTLE + _STEPS):
            if step == _SETTLE:
                started = time.perf_counter()
            trainer.step(trainer.share(inputs[step * config.batch_size : (step + 1) * config.batch_size]))
        print(config.batch_size * _STEPS / (time.perf_counter() - started))


if __name__ == "__main__":
    one_run(*sys.argv[1:]) if len(sys.argv) == 3 else main()
