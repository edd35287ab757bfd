"""The races on a processor. `pytest bench --benchmark-only` runs all of them but those of `LONG`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from bench import (
    assemble,
    autoregressive,
    conversion,
    coupling,
    fitting,
    flows,
    glow,
    linear,
    memory,
    neighbours,
    splines,
    training,
    two_moons,
)
from bench.cases import COUPLING_MODES, COUPLINGS, DEPTH, FLOWS, GRID, MASKED, MODES, SMALL_BATCH, SPLINES
from bench.libraries import LIBRARIES
from bench.linear import LinearCase
from bench.race import Case, Provider, Race

__all__ = ["LONG", "races"]

# The large cases are for those who come near the machine's rate. FrEIA stands for the libraries where there are many cases: it
# is the fastest of them nearly everywhere.
ALL, FEW = ("glf_fast", "eager", "compile", *LIBRARIES, "flowjax"), ("glf_fast", "eager", "FrEIA")
# torch.compile takes longer to compile a case than all take to run it, so at B = 16, between 1 and 64, it is left out. So it
# is in flows of splines, each of which takes it minutes; the suite "spline" has it.
UNCOMPILED = tuple(name for name in ALL if name != "compile")
COMPILED = (64, 24, 8, 8)  # the shape of images for which torch.compile is there
# The backward is two products and their transposes: where many matrices are small, and where few are large.
TRAINED = {LinearCase(32, 192), LinearCase(1024, 8), LinearCase(1024, 16), LinearCase(1024, 32), LinearCase(1024, 64)}
LONG = ("neighbours", "two_moons")  # suites that take minutes


def race(
    suite: str, case: Case, mode: str, providers: Mapping[str, Provider], seconds: float, names: Iterable[str] = ()
) -> Race:
    """`seconds`: for all providers together."""
    names = tuple(names or providers)
    return Race(suite, case, mode, tuple(providers[name] for name in names), seconds / len(names))


def races() -> Iterator[Race]:
    """Every race, the long ones last."""
    yield from _conversions()
    yield from _couplings()
    yield from _flows()
    yield from _layers()
    for steps in (8, 16, 32, 64):
        yield race("memory", memory.MemoryCase(steps), "train", memory.PROVIDERS, 0.0)
    for preset in training.IMAGES:
        yield race("train_step", training.PresetCase(preset), "step", training.PROVIDERS, 4.5)
    yield race("glow", glow.CASE, "step", glow.PROVIDERS, 4.5)
    yield race(
        "glow", glow.MEMORY, "train", glow.PROVIDERS, 0.0, [name for name in glow.PROVIDERS if name != "compile"]
    )
    yield race("fit", fitting.FitCase("sbi"), "fit", fitting.PROVIDERS, 2.0)
    for flow in ("sbi", "glf-mnist"):
        for processes in (1, 2, 4, 8):
            case = neighbours.NeighboursCase(flow, processes)
            yield race("neighbours", case, "train", neighbours.PROVIDERS, 0.0)
    yield race("two_moons", two_moons.MoonsCase(), "npe", two_moons.PROVIDERS, 0.0)


def _conversions() -> Iterator[Race]:
    """Libraries in all modes; kinds of layers shorter, and without the optimizer."""
    for case in conversion.cases():
        library = case.kind in LIBRARIES
        for mode in MODES if library else MODES[:3]:
            yield race("convert", case, mode, conversion.PROVIDERS, 3.0 if library else 1.5)


def _couplings() -> Iterator[Race]:
    for case in COUPLINGS:
        names = [name for name in coupling.PROVIDERS if name != "compile" or case.shape == COMPILED]
        for mode in COUPLING_MODES:
            yield race("coupling", case, mode, coupling.PROVIDERS, 1.0, names)
    for splines_of in SPLINES:
        for mode in COUPLING_MODES:
            yield race("spline", splines_of, mode, splines.PROVIDERS, 0.5)


def _flows() -> Iterator[Race]:
    for name in ("glf-cifar", "glf-mnist", "sbi"):
        for mode in MODES:
            yield race("flow", FLOWS[name], mode, flows.PROVIDERS, 4.0, ALL)
    for name in ("splines", "sbi-splines"):
        for mode in MODES:
            yield race("flow", FLOWS[name], mode, flows.PROVIDERS, 1.0, UNCOMPILED)
    for name, modes in (("sbi-maf", ("train", "step")), ("sbi-maf-10000", ("log_prob", "sample"))):
        for mode in modes:
            yield race("flow", MASKED[name], mode, autoregressive.PROVIDERS, 1.6)
    for case in SMALL_BATCH.values():
        for mode in ("log_prob", "sample"):
            yield race("flow", case, mode, flows.PROVIDERS, 3.0, UNCOMPILED if case.batch == 16 else ALL)
    for name in ("throughput", "wide"):
        for mode in ("log_prob", "train"):
            yield race("flow", FLOWS[name], mode, flows.PROVIDERS, 3.0, FEW)
    for suite, cases in (("depth", DEPTH), ("grid", GRID)):
        for case in cases.values():
            yield race(suite, case, "train", flows.PROVIDERS, 0.5, FEW)


def _layers() -> Iterator[Race]:
    for case in linear.LINEAR:
        for mode in ("forward", "train") if case in TRAINED else ("forward",):
            # CuPy once, to say why it is not measured on a processor.
            names = ("glf_fast", "torch.linalg", *(("CuPy",) if case == linear.LINEAR[0] else ()))
            yield race("linear", case, mode, linear.PROVIDERS, 0.5, names)
    for layer in linear.APPLIED:
        for mode in ("forward", "inverse", "train"):
            yield race("apply", layer, mode, linear.appliers(layer), 0.5)
    for factors in assemble.CASES:
        for mode in ("forward", "train"):
            yield race("assemble", factors, mode, assemble.PROVIDERS, 0.5)
