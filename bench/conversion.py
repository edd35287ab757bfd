"""Flows of four libraries, and what `glf_fast.convert` makes of them.

The flows are what each library offers at the size of the case, and one of each kind of its layers. The converted flow has the
same parameters and the same density, which is checked before anything is timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from bench.cases import FLOWS, GLOW, FlowCase, ImageCase, Unrated
from bench.check import why_wrong
from bench.flows import Flow
from bench.libraries import IMAGE_KINDS, KINDS, LIBRARIES, Density
from bench.race import Clock, Job, Provider
from glf_fast import convert

__all__ = ["PROVIDERS", "ConversionCase", "cases"]


@dataclass(frozen=True)
class ConversionCase(Unrated):
    """A library's own flow, or one of a kind of its layers ("LIBRARY KIND")."""

    kind: str
    of: FlowCase | ImageCase

    @property
    def name(self) -> str:
        """The case's and the kind's."""
        return f"{self.of.name} of {self.kind}"

    @property
    def sizes(self) -> dict[str, Any]:
        """For results."""
        return {"batch": self.of.batch}

    def density(self) -> Density:
        """The library's."""
        if isinstance(self.of, ImageCase):
            return IMAGE_KINDS[self.kind](self.of)
        return KINDS[self.kind](self.of) if self.kind in KINDS else LIBRARIES[self.kind].flow(self.of, "cpu")


def cases() -> Iterator[ConversionCase]:
    """Libraries at two sizes, then kinds at one."""
    for size in ("glf-mnist", "sbi"):
        yield from (ConversionCase(library, FLOWS[size]) for library in LIBRARIES)
    yield from (ConversionCase(kind, FLOWS["glf-mnist"]) for kind in KINDS)
    yield from (ConversionCase(kind, GLOW) for kind in IMAGE_KINDS)


@cache
def pair(case: ConversionCase) -> dict[str, Flow]:
    """Both flows, data-dependent starts done, parameters a little off their initial values."""
    torch.manual_seed(0)
    original = Flow(case.density(), "cpu")
    original.run("log_prob", *replace(case.of, batch=256).inputs())
    with torch.no_grad():
        for p in original.module.parameters():
            if p.requires_grad:  # FrEIA's permutations are parameters that are not trained
                p.add_(0.01 * torch.randn_like(p))
    flow = convert(original.module)
    return {"original": original, "glf_fast": Flow(Density(flow, flow.log_prob, flow.sample), "cpu", "auto")}


def _job(name: str, case: ConversionCase, mode: str, clock: Clock) -> Job:
    both = pair(case)
    for flow in both.values():
        flow.module.train(mode in ("train", "step"))

    def check(found: Tensor) -> str:
        """Compare the converted flow's results with the original's."""
        if name == "original":
            return ""
        wanted = both["original"].run(mode, *case.of.inputs())
        if mode == "sample":  # another noise: only what must be so
            return "" if found.shape == wanted.shape and found.isfinite().all() else "not samples"
        return why_wrong([found], [wanted.double()])

    return both[name].job(mode, case.of, "cpu", check)


def _why_not(case: ConversionCase, mode: str, device: str) -> str:
    return LIBRARIES[case.kind.partition(" ")[0]].why_not(case.of if isinstance(case.of, FlowCase) else None)


PROVIDERS = {name: Provider(name, partial(_job, name), _why_not) for name in ("original", "glf_fast")}
