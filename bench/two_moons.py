"""Two moons with sbi's NPE: training and quality of sbi's default estimator and of our coupling flow.

Time is that of `NPE.train()` with sbi's default settings, until its own stopping rule: one run a seed, both estimators in turn.
Quality is C2ST, which is not timed. `bench.posteriors` has more tasks, and a flow of sbi's kind.
"""

from __future__ import annotations

import importlib.util
import statistics
import warnings
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from bench.cases import Unrated
from bench.race import Clock, Job, Provider
from bench.sbi_tasks import TASKS, c2st, elsewhere, train

__all__ = ["PROVIDERS", "MoonsCase"]


@dataclass(frozen=True)
class MoonsCase(Unrated):
    """One run a seed."""

    simulations: int = 10_000
    seeds: int = 5
    samples: int = 2_000
    name: str = "two-moons"

    @property
    def sizes(self) -> dict[str, Any]:
        """For results."""
        return {"batch": 200, "simulations": self.simulations}


@cache
def runs(case: MoonsCase) -> dict[str, list[dict[str, Any]]]:
    """Times and scores of each estimator's runs."""
    from glf_fast.integrations.sbi import coupling_flow

    task, found = TASKS["two moons"], {name: [] for name in PROVIDERS}  # type: ignore[var-annotated]
    with elsewhere():
        for seed in range(case.seeds):
            for name in [*found] if seed % 2 == 0 else reversed(found):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    posterior, run = train(task, "maf" if name == "sbi" else coupling_flow(), seed, case.simulations)
                    samples = [
                        posterior.sample((case.samples,), x=x[None], show_progress_bars=False)
                        for x in task.observations()
                    ]
                    found[name].append(run | {"c2st": statistics.mean(c2st(task, samples))})
                print(f"\nseed {seed}, {name}: {found[name][-1]}", flush=True)
    return found


def _job(name: str, case: MoonsCase, mode: str, clock: Clock) -> Job:
    found = runs(case)[name]
    info = {key: [run[key] for run in found] for key in ("c2st", "epochs", "loss")}
    seconds = [run["seconds"] for run in found]
    return Job(None, lambda _: "", seconds=seconds, info=info | {"parameters": found[0]["parameters"]})


def _why_not(case: MoonsCase, mode: str, device: str) -> str:
    return "" if importlib.util.find_spec("sbi") else "sbi is not installed (make bench installs it)"


PROVIDERS = {name: Provider(name, partial(_job, name), _why_not) for name in ("sbi", "glf_fast")}
