"""Flows that public projects and samplers train, before and after `accelerate`, as races on a GPU.

bench/projects/ has their layers. `python -m bench.projects` measures all of them on a processor.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench.cases import Unrated
from bench.check import why_wrong
from bench.libraries import LIBRARIES
from bench.race import Clock, Job, Provider

if TYPE_CHECKING:
    from bench.projects import Project
    from bench.projects.passes import Pair

__all__ = ["MODES", "PROJECTS", "PROVIDERS", "ProjectCase"]

MODES = ("step", "log_prob", "sample")  # a step with torch's default Adam
# What sbi, nessai, lampe, aspire and anomalib build, and a few flows of papers; the most important first.
PROJECTS = (
    "sbibm maf", "nessai RealNVP", "lampe NPE, NSF", "anomalib CFLOW", "sbibm nsf", "aspire, zuko RealNVP",
    "lampe NPE, MAF", "anomalib FastFlow", "boltzmann-generators", "normflows examples, Glow", "CaloINN, affine",
    "anomalib U-Flow", "glasflow RealNVP, conditional", "Glow on MNIST",
)  # fmt: skip


@dataclass(frozen=True)
class ProjectCase(Unrated):
    """A project's flow at its size and batch, or a small one of the same layers."""

    name: str
    small: bool = False

    @property
    def sizes(self) -> dict[str, Any]:
        """For results."""
        return {"batch": self.project().batch}

    def project(self) -> Project:
        """Its description. The libraries are imported here, because a machine may have none of them."""
        from bench.projects import PROJECTS, SMALL

        found = PROJECTS[self.name]
        return replace(found, build=lambda sizes: found.build(SMALL), batch=8) if self.small else found


@lru_cache(maxsize=1)
def _pair(case: ProjectCase) -> Pair:
    """Both flows, on the processor: a race's modes follow each other."""
    from bench.projects.passes import pair_of

    pair = pair_of(case.project())
    assert pair, f"{case.name} stays as it is"
    return pair


@cache
def _exact(case: ProjectCase, mode: str) -> Tensor:
    """The original's loss or log p in float64."""
    from bench.projects.passes import passes

    project = case.project()
    x, context = _inputs(project)
    flow = copy.deepcopy(_pair(case).flows["original"]).double()
    return passes(project, flow, mode)(x.double(), None if context is None else context.double())


def _inputs(project: Project) -> tuple[Tensor, Tensor | None]:
    torch.manual_seed(1)
    return project.inputs(project.batch)


def _job(name: str, case: ProjectCase, mode: str, clock: Clock) -> Job:
    from bench.projects.passes import passes

    project, pair = case.project(), _pair(case)
    flow = copy.deepcopy(pair.flows[name]).to(clock.DEVICE)

    def check(found: Tensor) -> str:
        if mode == "sample":  # each draws noise of its own: only what must be so
            right = found.shape == (project.batch, *project.shape) and found.isfinite().all()
            return "" if right else f"{tuple(found.shape)}, or not all finite"
        return why_wrong([found.cpu()], [_exact(case, mode)])

    inputs = tuple(None if t is None else t.to(clock.DEVICE) for t in _inputs(project))
    info = {"accelerate_s": pair.seconds, "into": pair.into} if name == "glf_fast" else {}
    return Job(passes(project, flow, mode), check, inputs, info)


def _why_not(case: ProjectCase, mode: str, device: str) -> str:
    return next((why for library in LIBRARIES.values() if (why := library.why_not())), "")  # bench.projects imports all


PROVIDERS = {name: Provider(name, partial(_job, name), _why_not) for name in ("original", "glf_fast")}
