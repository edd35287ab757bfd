"""Posteriors of sbi's NPE, with its default settings, on three tasks: `python -m bench.posteriors --out FOLDER`.

The estimators are sbi's default (a masked autoregressive flow in nflows), the same one by `glf_fast.accelerate`, and
`glf_fast.integrations.sbi.maf()`, trained by sbi's loop and by `glf_fast.integrations.sbi.train`. Each is trained from the same
simulations until sbi's own stopping rule, and then draws 10,000 posterior samples for each of five observations. Quality is
C2ST, which is not timed: how well a random forest tells 2,000 of these samples from exact ones (0.5: not at all), the mean of
the observations.

The folder gets posteriors.json, a row as soon as it is measured, and posteriors.md. The same command goes on where it was
stopped.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import glf_fast
from bench.machine import about
from bench.sbi_tasks import TASKS, c2st, elsewhere, train
from glf_fast.files import read_json, write_json

__all__ = ["ESTIMATORS", "measure", "page", "study"]

Row = dict[str, Any]


def _accelerated() -> Callable[..., Any]:
    from sbi.neural_nets import posterior_nn

    build = posterior_nn("maf")

    def accelerated(theta: torch.Tensor, x: torch.Tensor) -> Any:
        estimator = build(theta, x)
        report = glf_fast.accelerate(estimator)
        if not report.replaced:
            raise RuntimeError(f"accelerate replaced nothing: {report.left[0].reason}")
        return estimator

    return accelerated


def _maf() -> Callable[..., Any]:
    from glf_fast.integrations.sbi import maf

    return maf()


ESTIMATORS: dict[str, Callable[[], Any]] = {
    "sbi": lambda: "maf",
    "accelerate": _accelerated,
    "glf_fast": _maf,
    "glf_fast, train": _maf,
}


def measure(task: str, estimator: str, seed: int, simulations: int, drawn: int, judged: int) -> Row:
    """One row: seconds of training and of `drawn` samples, and C2ST of `judged` of them."""
    from glf_fast.integrations import sbi

    by = sbi.train if estimator == "glf_fast, train" else None
    posterior, run = train(TASKS[task], ESTIMATORS[estimator](), seed, simulations, by)
    seconds, samples = [], []
    for x in TASKS[task].observations():
        torch.manual_seed(seed)
        start = time.perf_counter()
        samples.append(posterior.sample((drawn,), x=x[None], show_progress_bars=False)[:judged])
        seconds.append(time.perf_counter() - start)
    scores = c2st(TASKS[task], samples)
    return run | {"sampling_seconds": statistics.mean(seconds), "c2st": statistics.mean(scores), "c2st_each": scores}


def study(folder: Path, tasks: Sequence[str], estimators: Sequence[str], seeds: int, **sizes: int) -> dict[str, Any]:
    """Measure the rows that the folder does not have yet; all estimators of a task and seed one after the other.

    Raises:
        ValueError: its rows are of other sizes, or of another machine.
    """
    path = (folder / "posteriors.json").resolve()
    machine = about() | {"cpu": _processor()}
    found: dict[str, Any] = {
        "machine": machine,
        "date": datetime.now(timezone.utc).isoformat(),
        "sizes": sizes,
        "rows": [],
    }
    if path.exists():
        found = read_json(path)
        for name in ("cpu", "torch", "threads"):
            if found["machine"][name] != machine[name]:
                raise ValueError(
                    f"{path} has rows with {name} {found['machine'][name]}, not {machine[name]}: choose another folder"
                )
        if found["sizes"] != sizes:
            raise ValueError(f"{path} has rows of sizes {found['sizes']}, not {sizes}: choose another folder")
    rows: list[Row] = found["rows"]
    done = {(row["task"], row["estimator"], row["seed"]) for row in rows}
    with elsewhere(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(seeds):
            for task in tasks:
                for estimator in estimators if seed % 2 == 0 else reversed(estimators):
                    key = {"task": task, "estimator": estimator, "seed": seed}
                    if tuple(key.values()) in done:
                        continue
                    try:
                        rows.append(key | {"commit": machine["commit"]} | measure(task, estimator, seed, **sizes))
                    except RuntimeError as error:
                        print(f"{task}, {estimator}, seed {seed}: {error}", flush=True)
                        continue
                    write_json(path, found)
                    print(", ".join(f"{name} {_short(value)}" for name, value in rows[-1].items()), flush=True)
    path.with_suffix(".md").write_text("\n".join(page(found)) + "\n")
    return found


def page(found: Mapping[str, Any]) -> Iterator[str]:
    """The table: a row a task and estimator; means and standard deviations of the seeds."""
    machine, sizes = found["machine"], found["sizes"]
    yield (
        f"sbi's NPE with its default settings, {sizes['simulations']:,} simulations; {machine['cpu']}, {machine['threads']} "
        f"threads, torch {machine['torch']}, commit {machine['commit']}, {found['date'][:10]}."
    )
    yield "× is how many times as long sbi's own estimator takes for training and samples together. C2ST: 0.5 is perfect."
    yield ""
    yield f"| task | estimator | training | epochs | {sizes['drawn']:,} samples | × | C2ST | seeds |"
    yield "|---|---|---|---|---|---|---|---|"
    rows: list[Row] = found["rows"]
    for task in dict.fromkeys(row["task"] for row in rows):
        whole: dict[str, float] = {}
        for estimator in ESTIMATORS:
            own = [row for row in rows if row["task"] == task and row["estimator"] == estimator]
            if not own:
                continue
            whole[estimator] = statistics.mean(row["seconds"] + row["sampling_seconds"] for row in own)
            times = f"{whole['sbi'] / whole[estimator]:.2f}" if "sbi" in whole else ""
            cells = [
                f"{_spread(own, 'seconds', '.1f')} s",
                _spread(own, "epochs", ".0f"),
                f"{_spread(own, 'sampling_seconds', '.3f')} s",
                times,
                _spread(own, "c2st", ".3f"),
            ]
            yield f"| {task} | {estimator} | {' | '.join(cells)} | {len(own)} |"


def _spread(rows: Sequence[Row], name: str, how: str) -> str:
    values = [row[name] for row in rows]
    mean = format(statistics.mean(values), how)
    return f"{mean} ± {statistics.stdev(values):{how}}" if len(values) > 1 else mean


def _short(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _processor() -> str:
    import cpuinfo  # type: ignore[import-untyped]

    return str(cpuinfo.get_cpu_info().get("brand_raw", "a processor that does not say its name"))


def main() -> None:
    """Run the study, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seeds", type=int, default=5, help="number of runs of each estimator on each task")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help="tasks to run")
    parser.add_argument(
        "--estimators", nargs="+", choices=ESTIMATORS, default=list(ESTIMATORS), help="estimators to train"
    )
    parser.add_argument("--simulations", type=int, default=2_000, help="simulations for training and validation")
    arguments = parser.parse_args()
    try:
        found = study(
            arguments.out, arguments.tasks, arguments.estimators, arguments.seeds,
            simulations=arguments.simulations, drawn=10_000, judged=2_000,
        )  # fmt: skip
    except ValueError as error:
        raise SystemExit(str(error)) from None
    print("\n".join(page(found)))


if __name__ == "__main__":
    main()
