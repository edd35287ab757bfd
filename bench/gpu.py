"""One part of the GPU benchmark: `python -m bench.gpu PART OUT [--seconds S] [--rehearse]`. Adds to OUT/gpu.json, row by row.

Every row is written at once, so that whatever stops a part costs what it had not measured yet. What is not right (against
the reference in float64, in the same process) or fails is named in the file, and has no time. `python tools/gpu.py` runs the
parts one after the other, each in a process with a time limit of its own. `--rehearse` runs a part with small cases on a
processor: its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import copy
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

from bench import gpu_part as part
from bench import machine, rehearsal
from bench.baselines import COMPILED, LIBRARIES, Provider, provider, why_missing
from bench.cases import DEPTH, FLOWS, GRID, SMALL_BATCH, FlowCase
from bench.gpu_layers import coupling_jobs, layer_jobs, linear_jobs
from bench.gpu_part import OURS_AND_EAGER, SECONDS, Job, Missing, OutOfTime, check_time, rehearsing, replays
from bench.memory import wrong_gradients
from bench.results import Result, Results, merge, read, stats, write
from bench.training import IMAGES, Step
from bench.training import PROVIDERS as STEP_PROVIDERS
from glf_fast import CouplingFlow, use_backend

__all__ = ["PARTS", "main"]

PRECISIONS = {"highest": "float32", "high": "tf32", "medium": "bf16"}
NAMED = ("glf-cifar", "glf-mnist", "sbi")
FLOW_MODES = ("train", "log_prob", "sample")


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
    made = provider("eager" if name == "graphed eager" else name, case, mode in ("train", "step"), part.clock.DEVICE)
    work = partial(made.run, mode, *case.inputs(part.clock.DEVICE))
    for _ in range(3):  # what is captured at the second call is checked at the fourth
        work()
    if wrong := made.why_wrong(mode, case, precision):
        raise AssertionError(wrong)
    operations, size, rate = case.operations(mode), case.bytes(mode), part.clock.matrix_rate(precision)
    check_time()
    info: dict[str, Any] = {
        "batch": case.batch, "dim": case.dim, "hidden": case.hidden, "steps": case.steps, "precision": precision,
        "operations": operations, "bytes": size, "yardstick_s": max(operations / rate, size / part.clock.bandwidth()),
        "matrix_gflops": rate / 1e9, "threads": 1, "parameters": made.parameters(),
    }  # fmt: skip
    if name == "graphed eager":
        graph = part.clock.Graph(work)
        work = graph.replay
    elif name != "reduce-overhead":  # whose memory belongs to its graphs
        info["peak_bytes"] = part.clock.peak_memory(work)
    calls, info["host_s"] = part.clock.call_times(work, SECONDS)
    if name in OURS_AND_EAGER:
        info |= replays(work)
    info["gflops"] = operations / statistics.median(calls) / 1e9
    # Of the kernels alone, where they are known alone.
    kernels = info["graph_cold"]["median"] if "graph_cold" in info else statistics.median(calls)
    info["share_of_matrix_rate"] = operations / kernels / rate
    return Result(suite, case.name, label, name, stats(calls), info)


def memory_jobs() -> Iterator[Job]:
    """Peak memory of a training pass against depth."""
    ways = (("glf_fast", "auto", False), ("glf_fast reversible", "auto", True), ("eager", "reference", False))
    for steps in (1, 2) if rehearsing() else (64, 8, 32, 16):
        for name, backend, reversible in ways:
            yield "memory", f"memory-{steps}", "train", name, partial(memory, steps, name, backend, reversible)


def memory(steps: int, name: str, backend: str, reversible: bool) -> Result:
    """D 64, H 256, 256, B 4,096, with its gradients already there."""
    batch = 4 if rehearsing() else 4096
    torch.manual_seed(0)
    model = CouplingFlow(64, steps, (256, 256), reversible=reversible).to(part.clock.DEVICE)
    x = torch.randn(batch, 64, device=part.clock.DEVICE)

    def work() -> None:
        model.log_prob(x).mean().backward()

    with use_backend(backend):
        work()
        if wrong := wrong_gradients(model, x):
            raise AssertionError(wrong)
        peak, (calls, _) = part.clock.peak_memory(work), part.clock.call_times(work, SECONDS)
        model.requires_grad_(False)
        x.requires_grad_()
        activations = part.clock.peak_memory(work)
    info = {
        "batch": batch, "dim": 64, "hidden": (256, 256), "steps": steps, "peak_bytes": peak, "activation_bytes": activations,
        "parameter_bytes": 4 * sum(p.numel() for p in model.parameters()),
    }  # fmt: skip
    return Result("memory", f"memory-{steps}", "train", name, stats(calls), info)


def step_jobs() -> Iterator[Job]:
    """Whole training steps of the presets' models."""
    for name in STEP_PROVIDERS:  # the compiler last: it takes long
        for preset in IMAGES:
            if not (name == "compile" and rehearsing()):
                yield "train_step", preset, "step", name, partial(training, preset, name)


def training(preset: str, name: str) -> Result:
    """The trainer's own steps, each after the other, and the most memory that they held."""
    torch.set_float32_matmul_precision("high")
    step = Step(name, preset, part.clock.DEVICE, batch=4 if rehearsing() else 0)
    if wrong := step.why_wrong("high"):  # cuDNN's convolutions are tf32 by default
        raise AssertionError(wrong)
    peak = part.clock.peak_memory(step.run)
    calls, host = part.clock.call_times(step.run, 8 * SECONDS)
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
        made = provider(name, case, mode == "train", part.clock.DEVICE)
        if wrong := made.why_wrong(mode, case):
            raise AssertionError(wrong)
        number = part.clock.launches(partial(made.run, mode, *case.inputs(part.clock.DEVICE)))
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
        made: Provider = provider(name, case, mode == "train", part.clock.DEVICE)
        made.run(mode, *case.inputs(part.clock.DEVICE))
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
    return small if rehearsing() else cases


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("part", choices=tuple(PARTS))
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0, help="begin no new row after so many")
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    if arguments.rehearse:
        part.clock = rehearsal
    elif not torch.cuda.is_available():
        sys.exit("bench.gpu needs a CUDA GPU; on a processor: make bench, or --rehearse")
    part.end = time.monotonic() + arguments.seconds
    path = arguments.out / "gpu.json"
    about = machine.about() | {"gpu": part.clock.name(), "cuda": torch.version.cuda}
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
