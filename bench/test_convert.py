"""Flows of four libraries against what `glf_fast.convert` makes of them, interleaved.

    pytest bench/test_convert.py --benchmark-only

The flows are those of `bench.baselines`, what each library offers at the size of the case, and, for a shorter time, one of
each kind in `bench.kinds` and `bench.image_kinds`. The converted flow has the same parameters and the same density, which is
checked before anything is timed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.baselines import LIBRARIES, MAKERS, Provider, why_missing
from bench.cases import FLOWS, GLOW, MODES, FlowCase, ImageCase
from bench.check import why_wrong
from bench.image_kinds import IMAGE_KINDS
from bench.kinds import KINDS
from bench.walltime import Contestant, compete, report
from glf_fast import convert

Case = FlowCase | ImageCase
SECONDS, KIND_SECONDS = 3.0, 1.5  # for both
CASES = [FLOWS["glf-mnist"], FLOWS["sbi"]]
TASKS: list[tuple[str, Case, str]] = [
    *((library, case, mode) for case in CASES for library in LIBRARIES for mode in MODES),
    *((kind, CASES[0], mode) for kind in KINDS for mode in ("log_prob", "sample", "train")),
    *((kind, GLOW, mode) for kind in IMAGE_KINDS for mode in ("log_prob", "sample", "train")),
]


@dataclass(frozen=True)
class Pair:
    """A library's flow, and ours made of it."""

    original: Provider
    converted: Provider

    def why_wrong(self, mode: str, case: Case) -> str:
        """What the converted flow's results have that the original's have not, or ""."""
        x, context = case.inputs()
        found, wanted = (made.run(mode, x, context) for made in (self.converted, self.original))
        if mode == "sample":  # another noise: only what must be so
            return "" if found.shape == wanted.shape and found.isfinite().all() else "not samples"
        return why_wrong([found], [wanted.double()])


@cache
def pair(library: str, case: Case) -> Pair:
    """Both, data-dependent starts done, parameters a little off their initial values."""
    torch.manual_seed(0)
    if isinstance(case, ImageCase):
        original = IMAGE_KINDS[library](case)
    else:
        original = KINDS[library](case) if library in KINDS else MAKERS[library](case, "cpu")
    original.run("log_prob", *replace(case, batch=256).inputs())
    with torch.no_grad():
        for p in original.module.parameters():
            if p.requires_grad:  # FrEIA's permutations are parameters that are not trained
                p.add_(0.01 * torch.randn_like(p))
    flow = convert(original.module)
    return Pair(original, Provider("glf_fast", flow, flow.log_prob, lambda n, c: flow.sample(n, c), "cpu", "auto"))


@cache
def times(library: str, case: Case, mode: str) -> dict[str, list[float] | str]:
    """Seconds of both flows' passes, measured in turn."""
    made = pair(library, case)
    x, context = case.inputs()
    for provider in (made.original, made.converted):
        provider.module.train(mode in ("train", "step"))
    contestants = {
        library: Contestant(partial(made.original.run, mode, x, context), lambda: ""),
        "glf_fast": Contestant(partial(made.converted.run, mode, x, context), partial(made.why_wrong, mode, case)),
    }
    return compete(contestants, SECONDS if library in MAKERS else KIND_SECONDS)


@pytest.mark.parametrize("name", ["original", "glf_fast"])
@pytest.mark.parametrize(("library", "case", "mode"), TASKS, ids=[f"{c.name}-{name}-{m}" for name, c, m in TASKS])
def test_convert(library: str, case: Case, mode: str, name: str, benchmark: BenchmarkFixture) -> None:
    if reason := why_missing(library.partition(" ")[0], case):
        pytest.skip(reason)
    made = pair(library, case)
    provider, key = (made.original, library) if name == "original" else (made.converted, "glf_fast")
    report(
        benchmark,
        times(library, case, mode)[key],
        case=f"{case.name} of {library}",
        mode=mode,
        provider=name,
        batch=case.batch,
        parameters=provider.parameters(),
    )
