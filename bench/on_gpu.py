"""The races on a GPU, and their order: groups of races, and the two calls that a GPU machine with limited time allows.

A call gives each of its groups so many of its seconds. What a group leaves is the next one's; races that came too late for
their group's end are run last, if there is time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from bench import accelerated, assemble, autoregressive, coupling, flows, linear, memory, splines, training
from bench.cases import (
    COUPLING_MODES,
    COUPLINGS,
    DEPTH,
    FLOWS,
    GRID,
    MASKED,
    SMALL_BATCH,
    SPLINES,
    CouplingCase,
    FlowCase,
)
from bench.gpu_record import untimed
from bench.libraries import LIBRARIES
from bench.linear import BACKENDS, LinearCase
from bench.race import GRAPHED, Case, Clock, Job, Provider, Race, graph_clock, graphed
from bench.results import Results

__all__ = [
    "BATCHES",
    "FIRST",
    "FLOW_MODES",
    "GROUPS",
    "NAMED",
    "OURS_AND_EAGER",
    "PRECISIONS",
    "SECOND",
    "WITH_GRAPHS",
    "races",
]

SECONDS = 0.12  # of each provider's calls
PRECISIONS = {"highest": "float32", "high": "tf32", "medium": "bf16"}
FLOW_MODES = ("train", "log_prob", "sample")
OURS_AND_EAGER = ("glf_fast", "eager")
NAMED = [FLOWS[name] for name in ("glf-cifar", "glf-mnist", "sbi")]
THROUGHPUT, WIDE = FLOWS["throughput"], FLOWS["wide"]
# glf-cifar at other batch sizes.
BATCHES = [SMALL_BATCH["small-batch-1"], SMALL_BATCH["small-batch-64"], FlowCase("batch-1024", 64, (256, 256), 8, 1024)]
WITH_GRAPHS = tuple(f"{name}{how}" for name in OURS_AND_EAGER for how in ("", GRAPHED))
DENSITIES = ("train", "log_prob")
# Images that fill a GPU, in both orders of memory.
LARGE = [CouplingCase((4096, 24, 16, 16), order) for order in ("contiguous", "channels-last")]
# Who inverts dense matrices; torch.linalg's default library may refuse to be captured.
DENSE = tuple(f"{name}{how}" for name in ("glf_fast", "torch.linalg") for how in ("", GRAPHED))


def race(
    suite: str, case: Case, mode: str, providers: Mapping[str, Provider], names: Iterable[str], **options: Any
) -> Race:
    """A race of the providers with these names; GRAPHED behind a name stands for the graph of its call."""
    chosen = [
        graphed(providers[name.removesuffix(GRAPHED)]) if name.endswith(GRAPHED) else providers[name] for name in names
    ]
    return Race(suite, case, mode, tuple(chosen), **({"seconds": SECONDS} | options))


def _flows(
    cases: Iterable[FlowCase], modes: Sequence[str], names: Sequence[str], precision: str = "high", suite: str = "flow"
) -> Iterator[Race]:
    """Passes, in one of torch's matmul precisions."""
    cases = list(cases)
    for mode in modes:
        for case in cases:
            label = f"{mode}, {PRECISIONS[precision]}" if suite == "flow" else ""
            yield race(suite, case, mode, flows.PROVIDERS, names, precision=precision, label=label)


def _large() -> Iterator[Race]:
    yield from _flows([THROUGHPUT], DENSITIES, ("glf_fast", "eager", f"eager{GRAPHED}"))
    yield from _flows([THROUGHPUT], DENSITIES, OURS_AND_EAGER, "medium")
    yield from _memory(64, 8)


def _compiled() -> Iterator[Race]:
    yield from _flows(NAMED, DENSITIES, flows.COMPILED)
    yield from _flows([THROUGHPUT], DENSITIES, ("compile",))


def _compiled_more() -> Iterator[Race]:
    yield from _flows(NAMED, ("sample",), flows.COMPILED)
    yield from _flows(BATCHES, FLOW_MODES, flows.COMPILED)


def _wide() -> Iterator[Race]:
    yield from _flows([WIDE], DENSITIES, OURS_AND_EAGER)
    yield from _flows([WIDE], DENSITIES, OURS_AND_EAGER, "medium")


def _memory(*depths: int) -> Iterator[Race]:
    for steps in depths:
        yield race("memory", memory.MemoryCase(steps), "train", memory.PROVIDERS, memory.PROVIDERS)


def _steps() -> Iterator[Race]:
    """Whole training steps of the presets' models, as the trainer makes them; cuDNN's convolutions are tf32 by default."""
    for preset in training.IMAGES:
        case, names = training.PresetCase(preset), training.PROVIDERS
        yield race("train_step", case, "step", training.PROVIDERS, names, seconds=1.0, precision="high")


def _couplings(names: Sequence[str] = OURS_AND_EAGER) -> Iterator[Race]:
    for case in [*LARGE, *COUPLINGS]:
        for mode in COUPLING_MODES:
            yield race("coupling", case, mode, coupling.PROVIDERS, names)


def _splines() -> Iterator[Race]:
    """Flows of splines, and splines alone."""
    yield from _flows([FLOWS["splines"], FLOWS["sbi-splines"]], FLOW_MODES, WITH_GRAPHS)
    for case in SPLINES:
        for mode in COUPLING_MODES:
            yield race("spline", case, mode, splines.PROVIDERS, splines.PROVIDERS)


def _autoregressive() -> Iterator[Race]:
    """sbi's default estimator: a training batch, and as many posterior samples as its tutorials draw."""
    for name, modes in (("sbi-maf", DENSITIES), ("sbi-maf-10000", ("log_prob", "sample"))):
        for mode in modes:
            case, providers = MASKED[name], autoregressive.PROVIDERS
            names = (*WITH_GRAPHS, "nflows", "zuko")
            yield race("flow", case, mode, providers, names, precision="high", label=f"{mode}, {PRECISIONS['high']}")


def _projects() -> Iterator[Race]:
    """Flows of other people's models as they are, and after `accelerate`; in calls, as they make them."""
    for name in accelerated.PROJECTS:
        for mode in accelerated.MODES:
            case, providers = accelerated.ProjectCase(name), accelerated.PROVIDERS
            yield race("projects", case, mode, providers, providers, precision="high")


def _linear(counts: Sequence[int], dims: Sequence[int], names: Sequence[str] = DENSE) -> Iterator[Race]:
    for count in counts:
        for dim in dims:
            yield race("linear", LinearCase(count, dim), "forward", linear.PROVIDERS, names)


def _layers() -> Iterator[Race]:
    """Operations of flows on their layers beside the whole-flow kernels, and their backward."""
    for factors in assemble.CASES:
        for mode in ("forward", "train"):
            yield race("assemble", factors, mode, assemble.PROVIDERS, OURS_AND_EAGER)
    for size in ((1024, 32), (8, 64), (1024, 64), (1024, 16)):
        yield race("linear", LinearCase(*size), "train", linear.PROVIDERS, ("glf_fast", "torch.linalg"))
    for layer in linear.APPLIED:
        for mode in COUPLING_MODES:
            yield race("apply", layer, mode, linear.appliers(layer), linear.appliers(layer))


def _counted(provider: Provider) -> Provider:
    """The number of launches of a pass, by the profiler, which some virtual machines do not let in; no times."""

    def job(case: Case, mode: str, clock: Clock) -> Job:
        made = provider.job(case, mode, clock)
        if wrong := made.why_wrong():
            raise AssertionError(wrong)
        number = graph_clock(clock).launches(made.run)
        if not number:
            raise AssertionError("the profiler saw no launches")
        return Job(None, made.check, info={"launches": number})

    return Provider(provider.name, job, provider.why_not)


def _launches() -> Iterator[Race]:
    providers = {name: _counted(flows.PROVIDERS[name]) for name in (*OURS_AND_EAGER, *LIBRARIES)}
    for mode in FLOW_MODES:
        for case in NAMED:
            yield race("launches", case, mode, providers, providers, precision="high")


def _once(provider: Provider) -> Provider:
    """One pass and no time: what it leaves in caches on disk makes the others short."""

    def job(case: Case, mode: str, clock: Clock) -> Job:
        provider.job(case, mode, clock).run()
        return Job(None, lambda _: "")

    return Provider(provider.name, job, provider.why_not)


def _warm() -> Iterator[Race]:
    """Ours and those that are compiled."""
    providers = {name: _once(flows.PROVIDERS[name]) for name in ("glf_fast", *flows.COMPILED)}
    for mode in FLOW_MODES:
        for name in providers:
            for case in NAMED:
                yield race("warm", case, mode, providers, [name], precision="high")


# Group → its races, the most important first.
GROUPS: dict[str, Callable[[], Iterator[Race]]] = {
    "named": partial(_flows, NAMED, FLOW_MODES, WITH_GRAPHS),
    "batches": partial(_flows, BATCHES, FLOW_MODES, WITH_GRAPHS),
    "compiled": _compiled,
    "large": _large,
    "linear": partial(_linear, (16384, 1024), (32, 64, 8, 16)),
    "coupling": _couplings,
    "compiled-more": _compiled_more,
    "train_step": _steps,
    "grid": partial(_flows, GRID.values(), ("train",), OURS_AND_EAGER, suite="grid"),
    "wide": _wide,
    "layers": _layers,
    "step": partial(_flows, NAMED, ("step",), (flows.GRAPHED_STEP, *WITH_GRAPHS)),
    "linear-more": partial(
        _linear, (16384, 1024, 32, 8), (32, 64, 8, 16, 4, 128, 192), (*DENSE[:1], *BACKENDS, "CuPy")
    ),
    "coupling-compiled": partial(_couplings, tuple(coupling.PROVIDERS)),
    "splines": _splines,
    "autoregressive": _autoregressive,
    "projects": _projects,
    "memory-more": partial(_memory, 32, 16),
    "depth": partial(_flows, DEPTH.values(), ("train",), OURS_AND_EAGER, suite="depth"),
    "bf16": partial(_flows, NAMED, FLOW_MODES, OURS_AND_EAGER, "medium"),
    "float32": partial(_flows, NAMED, FLOW_MODES, OURS_AND_EAGER, "highest"),
    "libraries": partial(_flows, NAMED, FLOW_MODES, tuple(LIBRARIES)),
    "launches": _launches,
    "warm": _warm,  # beside the tests, and in no call
}


# Group → seconds of the call, of 160: process start, imports and rulers count to the first.
FIRST: dict[str, float] = {"named": 30, "batches": 18, "compiled": 57, "large": 30, "linear": 12, "coupling": 13}
# Of 202 parts, for which the call has 140 s. "cut" is what the first call has no time of; the goals' rows follow, once
# more for the spread.
SECOND: dict[str, float] = {
    "cut": 20, "named": 22, "compiled-more": 35, "large": 15, "linear": 6, "coupling": 6, "grid": 10, "train_step": 16,
    "wide": 6, "step": 4, "layers": 6, "linear-more": 6, "coupling-compiled": 6, "splines": 9, "autoregressive": 6,
    "projects": 12, "memory-more": 3, "depth": 4, "bf16": 4, "float32": 4, "libraries": 8, "launches": 4,
    "compiled": 1, "batches": 1,
}  # fmt: skip

Shrink = Callable[[Iterable[Race]], Iterable[Race]]


def races(call: str, before: Results | None, shrink: Shrink = list) -> dict[str, tuple[float, list[Race]]]:
    """Group → its share of the call's time, and its races: of "first", "second" or a single group.

    `before`: what the first call has measured, where that is known. `shrink`: makes a rehearsal of each group's races.
    """
    if call in GROUPS:
        return {call: (1.0, [*shrink(GROUPS[call]())])}
    shares = FIRST if call == "first" else SECOND
    found = {}
    for group, seconds in shares.items():
        made = _cut(before, shrink) if group == "cut" else [*shrink(GROUPS[group]())]
        found[group] = seconds / sum(shares.values()), made
    return found


def _cut(before: Results | None, shrink: Shrink) -> list[Race]:
    """Races of the first call that have no time; none where its results are not known."""
    planned = [race for group in FIRST for race in shrink(GROUPS[group]())] if before else []
    rest = [(race, untimed(before, race)) for race in planned if before]
    return [race.only(names) for race, names in rest if names]
