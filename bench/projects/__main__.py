"""The gain of `accelerate` on the flows of public projects: `python -m bench.projects --keep MACHINE [--docs]`.

Every flow has its project's sizes and batch. Original and accelerated flow are timed in turn: a training step with torch's
default Adam, one with Adam(fused=True), log_prob, and samples. A result is kept only if the two have the same log_prob.
`--keep` writes bench/results/MACHINE/projects.json. `--docs` writes the table of docs/drop-in.md from these files.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.machine import about
from bench.processor_clock import THREADS, call_times
from bench.projects import PROJECTS, Project
from bench.projects.passes import MODES, pair_of, passes
from bench.projects.table import with_table
from bench.results import Result, Results, read, stats, write

__all__ = ["MODES", "main", "measured"]

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "bench" / "results"
DROP_IN = ROOT / "docs" / "drop-in.md"


def measured(project: Project, seconds: float) -> Iterator[Result]:
    """Times of the original and of the accelerated flow, in each mode; nothing of a flow that stays.

    Raises:
        RuntimeError: the flow is not replaced though it should be, or has another log_prob afterwards.
    """
    pair = pair_of(project)
    if pair is None:
        return
    info = {"batch": project.batch, "seconds": pair.seconds, "into": pair.into}
    for mode in MODES:
        if mode.endswith("step") and not project.training:
            continue  # fused in eval mode, it trains in another way
        works = {name: _work(project, copy.deepcopy(flow), mode) for name, flow in pair.flows.items()}
        for name, calls in call_times(works, seconds).items():
            if isinstance(calls, Exception):
                raise calls
            yield Result("projects", project.name, mode, name, stats(calls.seconds), dict(info))


def _work(project: Project, flow: nn.Module, mode: str) -> Callable[[], Any]:
    """A pass: a step has new data each time."""
    run = passes(project, flow, mode)
    if mode.endswith("step"):
        return lambda: run(*project.inputs(project.batch))
    return partial(run, *project.inputs(project.batch))


def _results(names: Sequence[str], seconds: float) -> Results:
    """The measurements of these projects, one line on the screen for each."""
    import cpuinfo  # type: ignore[import-untyped]

    torch.set_num_threads(THREADS)
    machine = {**about(), "cpu": {"brand_raw": cpuinfo.get_cpu_info().get("brand_raw", "")}}
    found = Results(machine, datetime.now(timezone.utc).isoformat(timespec="seconds"), [])
    for name in names:
        try:
            rows = list(measured(PROJECTS[name], seconds))
        except Exception as error:  # the others are worth measuring all the same
            found.wrong.append(f"{name}: {error}")
            print(f"{name}: {error}", flush=True)
            continue
        found.results += rows
        pairs = replace(found, results=rows).groups().items()
        gains = [f"{mode} {pair['original'].median / pair['glf_fast'].median:.2f}" for (_, _, mode), pair in pairs]
        print(f"{name}: {', '.join(gains) or 'stays as it is'}", flush=True)
    return found


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m bench.projects", description=__doc__)
    parser.add_argument("--keep", metavar="MACHINE", default="", help="folder of bench/results that gets projects.json")
    parser.add_argument("--docs", action="store_true", help="write the table of docs/drop-in.md")
    parser.add_argument("--projects", nargs="+", choices=PROJECTS, default=list(PROJECTS), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=0.2, help="for each flow in each mode")
    arguments = parser.parse_args()
    if arguments.keep or not arguments.docs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what the libraries call and PyTorch has deprecated
            found = _results(arguments.projects, arguments.seconds)
        if arguments.keep:
            write(found, RESULTS / arguments.keep / "projects.json")
    if arguments.docs:
        files = [read(path) for path in sorted(RESULTS.glob("*/projects.json"))]
        DROP_IN.write_text(with_table(DROP_IN.read_text(encoding="utf-8"), files), encoding="utf-8")
        print(DROP_IN)


if __name__ == "__main__":
    main()
