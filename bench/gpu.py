"""Benchmarks on a GPU: `python -m bench.gpu WHAT OUT [--seconds S] [--before FILE] [--rehearse]`. Adds to OUT/gpu.json.

WHAT is one of the two calls that a machine without a network has time for, "first" or "second" (bench/on_gpu.py), or a group of
them; `python tools/gpu.py` makes the calls. One process measures all, because each start costs seconds of a short loan.
Providers of a case and mode are checked against the reference in float64, one after the other, and then timed in turn. What
is not right or fails is named in the file, and has no time. After an error that leaves the GPU unusable the process ends
with code 75: called again, it goes on behind what was begun.
--before: the gpu.json of a first call. --rehearse: small cases on a processor, whose numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import gpu_clock, machine, on_gpu, rehearsal
from bench.gpu_record import Record
from bench.on_gpu import GROUPS
from bench.race import GraphClock, Job, Missing, Race, Timed
from bench.results import read

__all__ = ["LOST", "main"]

LAUNCHES = Path(__file__).parent.parent / "kernels" / "launch_table.json"
LOST = 75  # exit code: the GPU does not answer this process any more


@dataclass
class Run:
    """One process's work: races in their order, until its time is over."""

    record: Record
    clock: GraphClock
    end: float
    failures: list[str] = field(default_factory=list)

    def race(self, race: Race) -> None:
        """Check and time those of a race that were not tried yet."""
        jobs: dict[str, Job] = {}
        torch.compiler.reset()  # eight versions of a function is all that torch.compile compiles: docs/traps.md
        for name in self.record.untried(race):
            if self.out_of_time():
                break
            self.record.begin(race, name)
            try:
                jobs[name] = race.enter(name, self.clock)
            except Missing as reason:
                self.fail(race, name, f"not measured: {reason}")
            except Exception as error:  # whatever happens to one row must not cost the others
                traceback.print_exc()
                self.fail(race, name, _text(error), error)
        found = race.timed(jobs, self.clock)
        results = [outcome.result for outcome in found.values() if isinstance(outcome, Timed)]
        self.record.finish(results)  # before anything that ends the process
        for result in results:
            print(f"{', '.join(race.key):50} {result.provider:22} {result.median * 1e6:12.1f} µs", flush=True)
        for name, outcome in found.items():
            if isinstance(outcome, Exception):
                self.fail(race, name, _text(outcome), outcome)
        if any("graph_failed" in result.info for result in results):
            self.end_if_lost()

    def fail(self, race: Race, name: str, reason: str, error: Exception | None = None) -> None:
        """Write down why a row has no time; ends the process where an error took the GPU with it."""
        self.record.fail(race, name, reason)
        print(f"{', '.join(race.key):50} {name:22} {reason}", flush=True)
        if error:
            self.failures.append(name)
            self.end_if_lost()

    def end_if_lost(self) -> None:
        """End the process where the GPU does not answer it any more; who was only ready to be timed may be tried again."""
        if not self.clock.alive():
            self.record.release()
            print("the GPU does not answer this process any more", flush=True)
            sys.exit(LOST)

    def out_of_time(self) -> bool:
        """Whether nothing may be begun any more."""
        return time.monotonic() > self.end


def in_order(groups: dict[str, tuple[float, list[Race]]], start: float, seconds: float) -> Iterator[Race]:
    """The races, each before its group's end, and then those that came too late for it."""
    late: list[Race] = []
    share = 0.0
    for part, races in groups.values():
        share += part
        for race in races:
            if time.monotonic() > start + share * seconds:
                late.append(race)
            else:
                yield race
    yield from late


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


def main() -> None:
    """See the module's docstring."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("first", "second", *GROUPS), metavar="WHAT")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0, help="Begin nothing new after so many seconds.")
    parser.add_argument("--before", type=Path, help="Results of a first call: the second measures what is missing.")
    parser.add_argument("--share", default="0/1", metavar="I/N", help="Only every N-th race, from the I-th on.")
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    clock: GraphClock = rehearsal if arguments.rehearse else gpu_clock
    if not arguments.rehearse and not torch.cuda.is_available():
        sys.exit("bench.gpu needs a CUDA GPU; on a processor: make bench, or --rehearse")
    about: dict[str, Any] = machine.about() | {
        "gpu": clock.name(),
        "cuda": torch.version.cuda,
        "launch_table": json.loads(LAUNCHES.read_text())["made"],
    }
    if arguments.rehearse:
        about["quick"] = True  # bench.report keeps no such file
    before = read(arguments.before) if arguments.before and arguments.before.is_file() else None
    groups = on_gpu.races(arguments.what, before, rehearsal.small if arguments.rehearse else list)
    first, step = map(int, arguments.share.split("/"))
    groups = {group: (share, races[first::step]) for group, (share, races) in groups.items()}
    run = Run(Record(arguments.out / "gpu.json", about), clock, start + arguments.seconds)
    for race in in_order(groups, start, arguments.seconds):
        if run.out_of_time():
            print("out of time; the rest was not measured", flush=True)
            break
        run.race(race)
    if run.failures:
        sys.exit(f"{len(run.failures)} of the rows have no time")


if __name__ == "__main__":
    main()
