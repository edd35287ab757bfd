"""What is measured on a GPU, and in which order: groups of races, and the two calls that a lent machine has time for.

A call gives each of its groups so many of its seconds. What a group leaves is the next one's; races that came too late for
their group's end are run last, if there is time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from bench.baselines import COMPILED, GRAPHED, LIBRARIES
from bench.cases import COUPLINGS, DEPTH, FLOWS, GRID, SMALL_BATCH, FlowCase
from bench.couplings import PROVIDERS as COUPLED
from bench.gpu_flows import FLOW_MODES, flow_races, launch_races, memory_races, step_races, warm_races
from bench.gpu_layers import DENSE, LARGE, coupling_races, layer_races, linear_races
from bench.gpu_races import OURS_AND_EAGER, Race
from bench.gpu_record import untimed
from bench.linear import BACKENDS
from bench.results import Results

__all__ = ["BATCHES", "FIRST", "GROUPS", "SECOND", "races"]

NAMED = [FLOWS[name] for name in ("glf-cifar", "glf-mnist", "sbi")]
THROUGHPUT, WIDE = FLOWS["throughput"], FLOWS["wide"]
# glf-cifar at other batch sizes.
BATCHES = [SMALL_BATCH["small-batch-1"], SMALL_BATCH["small-batch-64"], FlowCase("batch-1024", 64, (256, 256), 8, 1024)]
WITH_GRAPHS = tuple(f"{name}{how}" for name in OURS_AND_EAGER for how in ("", GRAPHED))
DENSITIES = ("train", "log_prob")


def _large() -> Iterator[Race]:
    yield from flow_races([THROUGHPUT], DENSITIES, ("glf_fast", "eager", f"eager{GRAPHED}"))
    yield from flow_races([THROUGHPUT], DENSITIES, OURS_AND_EAGER, "medium")
    yield from memory_races((64, 8))


def _compiled() -> Iterator[Race]:
    yield from flow_races(NAMED, DENSITIES, COMPILED)
    yield from flow_races([THROUGHPUT], DENSITIES, ("compile",))


def _compiled_more() -> Iterator[Race]:
    yield from flow_races(NAMED, ("sample",), COMPILED)
    yield from flow_races(BATCHES, FLOW_MODES, COMPILED)


def _wide() -> Iterator[Race]:
    yield from flow_races([WIDE], DENSITIES, OURS_AND_EAGER)
    yield from flow_races([WIDE], DENSITIES, OURS_AND_EAGER, "medium")


# Group → its races, the most important first.
GROUPS: dict[str, Callable[[], Iterator[Race]]] = {
    "named": lambda: flow_races(NAMED, FLOW_MODES, WITH_GRAPHS),
    "batches": lambda: flow_races(BATCHES, FLOW_MODES, WITH_GRAPHS),
    "compiled": _compiled,
    "large": _large,
    "linear": lambda: linear_races((16384, 1024), (32, 64, 8, 16)),
    "coupling": lambda: coupling_races([*LARGE, *COUPLINGS]),
    "compiled-more": _compiled_more,
    "train_step": step_races,
    "grid": lambda: flow_races(list(GRID.values()), ("train",), OURS_AND_EAGER, suite="grid"),
    "wide": _wide,
    "layers": layer_races,
    "step": lambda: flow_races(NAMED, ("step",), WITH_GRAPHS),
    "linear-more": lambda: linear_races(
        (16384, 1024, 32, 8), (32, 64, 8, 16, 4, 128, 192), (*DENSE[:1], *BACKENDS, "CuPy")
    ),
    "coupling-compiled": lambda: coupling_races([*LARGE, *COUPLINGS], COUPLED),
    "memory-more": lambda: memory_races((32, 16)),
    "depth": lambda: flow_races(list(DEPTH.values()), ("train",), OURS_AND_EAGER, suite="depth"),
    "bf16": lambda: flow_races(NAMED, FLOW_MODES, OURS_AND_EAGER, "medium"),
    "float32": lambda: flow_races(NAMED, FLOW_MODES, OURS_AND_EAGER, "highest"),
    "libraries": lambda: flow_races(NAMED, FLOW_MODES, LIBRARIES),
    "launches": lambda: launch_races(NAMED),
    "warm": lambda: warm_races(NAMED),  # beside the tests, and in no call
}


# Group → seconds of the call, of 160: process start, imports and rulers count to the first.
FIRST: dict[str, float] = {"named": 30, "batches": 18, "compiled": 57, "large": 30, "linear": 12, "coupling": 13}
# Of 130. "cut" is what the first call has no time of; the goals' rows follow, once more for the spread.
SECOND: dict[str, float] = {
    "cut": 20, "named": 22, "compiled-more": 35, "large": 15, "linear": 6, "coupling": 6, "grid": 10, "train_step": 16,
    "wide": 6, "step": 4, "layers": 6, "linear-more": 6, "coupling-compiled": 6, "memory-more": 3, "depth": 4, "bf16": 4,
    "float32": 4, "libraries": 8, "launches": 4, "compiled": 1, "batches": 1,
}  # fmt: skip


def races(call: str, before: Results | None) -> dict[str, tuple[float, list[Race]]]:
    """Group → its share of the call's time, and its races: of "first", "second" or a single group.

    `before`: what the first call has measured, where that is known.
    """
    if call in GROUPS:
        return {call: (1.0, list(GROUPS[call]()))}
    shares = FIRST if call == "first" else SECOND
    found = {}
    for group, seconds in shares.items():
        made = _cut(before) if group == "cut" else list(GROUPS[group]())
        found[group] = seconds / sum(shares.values()), made
    return found


def _cut(before: Results | None) -> list[Race]:
    """What the first call should have measured, and has no time of; nothing where nobody says what it measured."""
    planned: Sequence[Race] = [race for group in FIRST for race in GROUPS[group]()] if before else []
    rest = [(race, untimed(before, race.suite, race.case, race.mode, race.names)) for race in planned if before]
    return [race.only(names) for race, names in rest if names]
