"""One part of the GPU benchmark: `python -m bench.gpu PART OUT [--seconds S] [--rehearse]`. Adds to OUT/gpu.json, row by row.

Every row is written at once, so that whatever stops a part costs what it had not measured yet. What is not right (against
the reference in float64, in the same process) or fails is named in the file, and has no time. `python tools/gpu.py` runs the
parts one after the other, each in a process with a time limit of its own. `--rehearse` runs a part with small cases on a
processor: its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import machine, rehearsal, timing
from bench.baselines import COMPILED, LIBRARIES, Provider, provider, why_missing
from bench.cases import COUPLING_MODES, COUPLINGS, DEPTH, FLOWS, GRID, SMALL_BATCH, CouplingCase, FlowCase
from bench.couplings import PROVIDERS as COUPLING_PROVIDERS
from bench.couplings import Coupling
from bench.factors import ASSEMBLED, Assembled, Factored, PluCase
from bench.linear import APPLIED, BACKENDS, GRAPHED, Applied, AppliedCase, Linear, LinearCase, applied_names
from bench.linear import why_missing as why_linear_missing
from bench.memory import wrong_gradients
from bench.results import Result, Results, merge, read, stats, write
from bench.training import IMAGES, Step
from bench.training import PROVIDERS as STEP_PROVIDERS
from glf_fast import CouplingFlow, use_backend

__all__ = ["PARTS", "main"]

SECONDS = 0.25  # of each measurement
PRECISIONS = {"highest": "float32", "high": "tf32", "medium": "bf16"}
NAMED = ("glf-cifar", "glf-mnist", "sbi")
FLOW_MODES = ("train", "log_prob", "sample")
OURS_AND_EAGER = ("glf_fast", "eager")
DIMS = ((32, 64, 8, 16, 4), (128, 192, 48, 96, 12, 24))  # those of the goals first

Measured = Callable[[], Result]
# One row to be: suite, case, mode, provider, and what measures it. It raises AssertionError for what is wrong.
Job = tuple[str, str, str, str, Measured]

clock: Any = timing  # or rehearsal
end = math.inf  # of the part's time


class Missing(Exception):
    """What cannot be measured here, and why."""


class OutOfTime(Exception):
    """The part's time is over."""


def check_time() -> None:
    """Between a row's steps, each of which is short."""
    if time.monotonic() > end:
        raise OutOfTime


def flow_jobs(
    suite: str, cases: list[FlowCase], modes: tuple[str, ...], names: tuple[str, ...], precision: str = "high"
) -> Iterator[Job]:
    """Providers of flows, in one of torch's matmul precisions."""
    for mode in modes:
        for case in _sized(cases):
            label = f"{mode}, {PRECISIONS[precision]}" if suite == "gpu_flow" else mode
            for name in names:
                yield suite, case.name, label, name, partial(flow, suite, label, case, mode, name, precision)


def flow(suite: str, label: str, case: FlowCase, mode: str, name: str, precision: str) -> Result:
    """Calls with the host in them, and for ours and plain PyTorch the kernels alone, from a graph."""
    if reason := why_missing(name, case):
        raise Missing(reason)
    torch.set_float32_matmul_precision(precision)
    made = provider("eager" if name == "graphed eager" else name, case, mode in ("train", "step"), clock.DEVICE)
    work = partial(made.run, mode, *case.inputs(clock.DEVICE))
    for _ in range(3):  # what is captured at the second call is checked at the fourth
        work()
    if wrong := made.why_wrong(mode, case, precision):
        raise AssertionError(wrong)
    operations, size, rate = case.operations(mode), case.bytes(mode), clock.matrix_rate(precision)
    check_time()
    info: dict[str, Any] = {
        "batch": case.batch, "dim": case.dim, "hidden": case.hidden, "steps": case.steps, "precision": precision,
        "operations": operations, "bytes": size, "yardstick_s": max(operations / rate, size / clock.bandwidth()),
        "matrix_gflops": rate / 1e9, "threads": 1, "parameters": made.parameters(),
    }  # fmt: skip
    if name == "graphed eager":
        graph = clock.Graph(work)
        work = graph.replay
    elif name != "reduce-overhead":  # whose memory belongs to its graphs
        info["peak_bytes"] = clock.peak_memory(work)
    calls, info["host_s"] = clock.call_times(work, SECONDS)
    if name in OURS_AND_EAGER:
        info |= replays(work)
    info["gflops"] = operations / statistics.median(calls) / 1e9
    # Of the kernels alone, where they are known alone.
    kernels = info["graph_cold"]["median"] if "graph_cold" in info else statistics.median(calls)
    info["share_of_matrix_rate"] = operations / kernels / rate
    return Result(suite, case.name, label, name, stats(calls), info)


def replays(*works: Callable[[], object]) -> dict[str, Any]:
    """Times of the kernels alone, from one graph over `works`; of one work also where it finds the caches warm."""
    if time.monotonic() > end:
        return {"graph_failed": "out of time"}
    try:
        graph = clock.Graph(*works)
        found = {"graph_cold": stats(graph.times(SECONDS, cold=True))}
        return found if len(works) > 1 else found | {"graph_warm": stats(graph.times(SECONDS, cold=False))}
    except RuntimeError as error:  # what cannot be captured has still been called
        traceback.print_exc()
        return {"graph_failed": str(error)[:300]}


def operation(
    suite: str,
    case: Any,
    mode: str,
    name: str,
    make: Callable[[], Any],
    operations: int = 0,
    graph: bool = True,
    **about: int,
) -> Result:
    """One provider's calls of an operation on layers; beside them the kernels alone, where a graph can hold them."""
    first = make()
    work = partial(first.run, mode)
    if wrong := first.why_wrong(mode):
        raise AssertionError(wrong)
    if name.endswith(GRAPHED):
        work = clock.Graph(work).replay
    check_time()
    calls, host = clock.call_times(work, SECONDS / 2)
    size = case.bytes(mode)
    yardstick = max(operations / clock.matrix_rate("highest") if operations else 0.0, size / clock.bandwidth())
    info: dict[str, Any] = {"bytes": size, "operations": operations, "yardstick_s": yardstick, "host_s": host, **about}
    kernels = statistics.median(calls)
    if graph:
        # Over copies that are together larger than three L2 caches, or many.
        copies = [work, *(partial(make().run, mode) for _ in range(1, clock.rotations(size)))]
        info |= replays(*copies)
        kernels = info.get("graph_cold", {"median": kernels})["median"]
    info |= {"share_of_copy": size / kernels / clock.bandwidth(), "gbytes_per_s": size / kernels / 1e9}
    return Result(suite, case.name, mode, name, stats(calls), info)


def coupling_jobs() -> Iterator[Job]:
    """The elementwise coupling of images, and of a size that fills a GPU; the compiler last: it takes long."""
    large = [CouplingCase((4096, 24, 16, 16), order) for order in ("contiguous", "channels-last")]
    cases = [CouplingCase((2, 4, 4, 4), "contiguous")] if clock is rehearsal else [*large, *COUPLINGS]
    for name in COUPLING_PROVIDERS:
        for case in cases:
            for mode in COUPLING_MODES:
                make = partial(Coupling, name, case, clock.DEVICE)
                yield "coupling", case.name, mode, name, partial(operation, "coupling", case, mode, name, make)


def linear_jobs() -> Iterator[Job]:
    """log|det| and inverse of dense matrices: ours, each library under torch.linalg, CuPy; the goals' sizes first."""
    sizes = (
        [(3, 5), (3, 6)]
        if clock is rehearsal
        else [(n, d) for dims in DIMS for n in (16384, 1024, 32, 8) for d in dims]
    )
    for case in (LinearCase(count, dim) for count, dim in sizes):
        for name in ("glf_fast", *BACKENDS, "CuPy"):
            yield dense(case, "forward", name)


def dense(case: LinearCase, mode: str, name: str) -> Job:
    """`torch.linalg, graphed` is its default library, captured: some sizes it may refuse, which is why it comes last."""

    def measure() -> Result:
        if reason := why_linear_missing(name, clock.DEVICE, mode):
            raise Missing(reason)
        make = partial(Linear, name.removesuffix(GRAPHED), case, clock.DEVICE)
        ours, about = name == "glf_fast", {"batch": case.count, "dim": case.dim}
        return operation("linear", case, mode, name, make, case.operations(mode), ours, **about)

    return "linear", case.name, mode, name, measure


def layer_jobs() -> Iterator[Job]:
    """What flows do with their layers beside the whole-flow kernels, and backwards."""
    small = clock is rehearsal
    for factors in [PluCase(2, 4)] if small else ASSEMBLED:
        for mode in ("forward", "train"):
            for name in OURS_AND_EAGER:
                make: Callable[[], Any] = partial(Assembled, name, factors, clock.DEVICE)
                work = partial(operation, "assemble", factors, mode, name, make, factors.operations(mode))
                yield "assemble", factors.name, mode, name, work
    cases = [LinearCase(n, d) for n, d in ([(2, 4)] if small else [(1024, 32), (8, 64), (1024, 64), (1024, 16)])]
    for case in cases:
        for name in ("glf_fast", "torch.linalg"):
            yield dense(case, "train", name)
    for case in cases:
        for name in ("glf_fast", "torch.linalg"):
            make = partial(Factored, name, case, clock.DEVICE)
            work = partial(
                operation, "lu", case, "forward", name, make, case.operations("forward") // 3, name == "glf_fast"
            )
            yield "lu", case.name, "forward", name, work
    for layer in [AppliedCase((2, 4))] if small else APPLIED:
        for mode in COUPLING_MODES:
            for name in applied_names(layer):
                make = partial(Applied, name, layer, clock.DEVICE)
                work = partial(operation, "apply", layer, mode, name, make, layer.operations(mode))
                yield "apply", layer.name, mode, name, work
    for case in cases:
        yield dense(case, "forward", f"torch.linalg{GRAPHED}")


def memory_jobs() -> Iterator[Job]:
    """Peak memory of a training pass against depth."""
    ways = (("glf_fast", "auto", False), ("glf_fast reversible", "auto", True), ("eager", "reference", False))
    for steps in (1, 2) if clock is rehearsal else (64, 8, 32, 16):
        for name, backend, reversible in ways:
            yield "memory", f"memory-{steps}", "train", name, partial(memory, steps, name, backend, reversible)


def memory(steps: int, name: str, backend: str, reversible: bool) -> Result:
    """D 64, H 256, 256, B 4,096, with its gradients already there."""
    batch = 4 if clock is rehearsal else 4096
    torch.manual_seed(0)
    model = CouplingFlow(64, steps, (256, 256), reversible=reversible).to(clock.DEVICE)
    x = torch.randn(batch, 64, device=clock.DEVICE)

    def work() -> None:
        model.log_prob(x).mean().backward()

    with use_backend(backend):
        work()
        if wrong := wrong_gradients(model, x):
            raise AssertionError(wrong)
        peak, (calls, _) = clock.peak_memory(work), clock.call_times(work, SECONDS)
        model.requires_grad_(False)
        x.requires_grad_()
        activations = clock.peak_memory(work)
    info = {
        "batch": batch, "dim": 64, "hidden": (256, 256), "steps": steps, "peak_bytes": peak, "activation_bytes": activations,
        "parameter_bytes": 4 * sum(p.numel() for p in model.parameters()),
    }  # fmt: skip
    return Result("memory", f"memory-{steps}", "train", name, stats(calls), info)


def step_jobs() -> Iterator[Job]:
    """Whole training steps of the presets' models."""
    for name in STEP_PROVIDERS:  # the compiler last: it takes long
        for preset in IMAGES:
            if not (name == "compile" and clock is rehearsal):
                yield "train_step", preset, "step", name, partial(training, preset, name)


def training(preset: str, name: str) -> Result:
    """The trainer's own steps, each after the other, and the most memory that they held."""
    torch.set_float32_matmul_precision("high")
    step = Step(name, preset, clock.DEVICE, batch=4 if clock is rehearsal else 0)
    if wrong := step.why_wrong("high"):  # cuDNN's convolutions are tf32 by default
        raise AssertionError(wrong)
    peak = clock.peak_memory(step.run)
    calls, host = clock.call_times(step.run, 8 * SECONDS)
    batch = len(step.images)
    info = {"batch": batch, "images_per_s": batch / statistics.median(calls), "host_s": host, "peak_extra_bytes": peak}
    return Result("train_step", preset, "step", name, stats(calls), info)


def compile_jobs() -> Iterator[Job]:
    """torch.compile and its reduce-overhead mode, in the order of their importance."""
    yield from flow_jobs("gpu_flow", _named(*NAMED), FLOW_MODES, COMPILED)
    yield from flow_jobs("gpu_flow", _named("throughput"), ("train", "log_prob"), ("compile",))
    yield from flow_jobs("gpu_flow", list(SMALL_BATCH.values()), ("log_prob", "sample"), COMPILED)


def launch_jobs() -> Iterator[Job]:
    """By the profiler, in a part of its own: some virtual machines do not let it in."""

    def count(case: FlowCase, mode: str, name: str) -> Result:
        if reason := why_missing(name, case):
            raise Missing(reason)
        made = provider(name, case, mode == "train", clock.DEVICE)
        if wrong := made.why_wrong(mode, case):
            raise AssertionError(wrong)
        number = clock.launches(partial(made.run, mode, *case.inputs(clock.DEVICE)))
        if not number:
            raise AssertionError("the profiler saw no launches")
        return Result("launches", case.name, mode, name, stats([0.0]), {"launches": number})

    for mode in FLOW_MODES:
        for case in _sized(_named(*NAMED)):
            for name in (*OURS_AND_EAGER, *LIBRARIES):
                yield "launches", case.name, mode, name, partial(count, case, mode, name)


def warm_jobs() -> Iterator[Job]:
    """Ours and those, compiled and not measured: what they leave in caches on disk makes the other parts short."""

    def only_compile(case: FlowCase, mode: str, name: str) -> Result:
        torch.set_float32_matmul_precision("high")
        made: Provider = provider(name, case, mode == "train", clock.DEVICE)
        made.run(mode, *case.inputs(clock.DEVICE))
        return Result("", "", "", "", {"median": 0.0}, {})

    for name in ("glf_fast", *COMPILED):
        for mode in FLOW_MODES:
            for case in _sized(_named(*NAMED)):
                yield "", case.name, mode, name, partial(only_compile, case, mode, name)


def _named(*names: str) -> list[FlowCase]:
    return [FLOWS[name] for name in names]


# Part → its jobs. The order is that of their importance.
PARTS: dict[str, Callable[[], Iterator[Job]]] = {
    "flow": lambda: flow_jobs("gpu_flow", _named(*NAMED), FLOW_MODES, (*OURS_AND_EAGER, "graphed eager", *LIBRARIES)),
    "compile": compile_jobs,
    "memory": memory_jobs,
    "coupling": coupling_jobs,
    "linear": linear_jobs,
    "large": lambda: flow_jobs(
        "gpu_flow", _named("throughput", "wide"), ("train", "log_prob"), (*OURS_AND_EAGER, "graphed eager")
    ),
    "layers": layer_jobs,
    "train_step": step_jobs,
    "grid": lambda: flow_jobs("grid", list(GRID.values()), ("train",), OURS_AND_EAGER),
    "large-bf16": lambda: flow_jobs(
        "gpu_flow", _named("throughput", "wide"), ("train", "log_prob"), OURS_AND_EAGER, "medium"
    ),
    "small": lambda: flow_jobs(
        "gpu_flow", list(SMALL_BATCH.values()), ("log_prob", "sample"), (*OURS_AND_EAGER, "graphed eager")
    ),
    "step": lambda: flow_jobs(
        "gpu_flow", _named(*NAMED), ("step",), (*OURS_AND_EAGER, "graphed eager", *LIBRARIES, *COMPILED)
    ),
    "depth": lambda: flow_jobs("depth", list(DEPTH.values()), ("train",), OURS_AND_EAGER),
    "bf16": lambda: flow_jobs("gpu_flow", _named(*NAMED), FLOW_MODES, OURS_AND_EAGER, "medium"),
    "launches": launch_jobs,
    "float32": lambda: flow_jobs("gpu_flow", _named(*NAMED), FLOW_MODES, OURS_AND_EAGER, "highest"),
    "warm": warm_jobs,
}


def _sized(cases: list[FlowCase]) -> list[FlowCase]:
    """Small ones in a rehearsal."""
    small = [replace(case, steps=2, batch=min(case.batch, 8)) for case in cases]
    return small if clock is rehearsal else cases


def main() -> None:
    """See the module's docstring."""
    global clock, end
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("part", choices=tuple(PARTS))
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0, help="begin no new row after so many")
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    if arguments.rehearse:
        clock = rehearsal
    elif not torch.cuda.is_available():
        sys.exit("bench.gpu needs a CUDA GPU; on a processor: make bench, or --rehearse")
    end = time.monotonic() + arguments.seconds
    path = arguments.out / "gpu.json"
    about = machine.about() | {"gpu": clock.name(), "cuda": torch.version.cuda}
    if arguments.rehearse:
        about["quick"] = True  # bench.report keeps no such file
    found = Results(about, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()), [])
    earlier = [read(path)] if path.is_file() else []
    try:
        merge([*copy.deepcopy(earlier), found])
    except ValueError as reason:  # of another commit: kept, under another name
        print(reason, flush=True)
        path.rename(path.with_name(f"gpu-{earlier.pop().machine['commit']}.json"))
    failures = 0
    for suite, case, mode, name, measure in PARTS[arguments.part]():
        try:
            check_time()
            result = measure()
            text = f"{result.median * 1e6:12.1f} µs"
            if suite:
                found.results.append(result)
        except OutOfTime:
            print("out of time; the rest was not measured", flush=True)
            break
        except Missing as reason:
            text = f"not measured: {reason}"
            found.wrong.append(f"{suite} {case}, {mode}, {name}: {text}")
        except Exception as error:  # whatever happens to one row must not cost the others
            text = f"{type(error).__name__}: {str(error)[:300]}"
            found.wrong.append(f"{suite} {case}, {mode}, {name}: {text}")
            failures += 1
            traceback.print_exc()
        print(f"{suite:10} {case:28} {mode:16} {name:20} {text}", flush=True)
        if suite:
            write(merge([*copy.deepcopy(earlier), found]), path)
        if name in COMPILED:
            torch.compiler.reset()
    if failures:
        sys.exit(f"{failures} of the rows have no time")


if __name__ == "__main__":
    main()
