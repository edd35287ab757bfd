"""Races of whole flows on a GPU: passes, peak memory against depth, training steps of models, numbers of launches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from bench import gpu_races
from bench.baselines import COMPILED, GRAPHED, LIBRARIES, Provider, Replayed, provider, why_missing
from bench.cases import FlowCase
from bench.gpu_races import OURS_AND_EAGER, Entry, Missing, Race, rehearsing
from bench.memory import wrong_gradients
from bench.training import IMAGES, Step
from bench.training import PROVIDERS as STEP_PROVIDERS
from glf_fast import CouplingFlow, use_backend

__all__ = ["FLOW_MODES", "PRECISIONS", "flow_races", "launch_races", "memory_races", "step_races", "warm_races"]

PRECISIONS = {"highest": "float32", "high": "tf32", "medium": "bf16"}
FLOW_MODES = ("train", "log_prob", "sample")
# Whose kernels are timed alone, too: a compiled flow's are those of reduce-overhead, whose own graphs nobody else can replay.
ALONE = ("glf_fast", "eager", "compile")


def flow_races(
    cases: Sequence[FlowCase],
    modes: Sequence[str],
    names: tuple[str, ...],
    precision: str = "high",
    suite: str = "gpu_flow",
) -> Iterator[Race]:
    """Providers of flows, in one of torch's matmul precisions."""
    if rehearsing() and {*names} & {*COMPILED}:  # a compiler takes ten seconds of two cores for each
        cases, modes = cases[:1], modes[:1]
    for mode in modes:
        for case in _sized(cases):
            label = f"{mode}, {PRECISIONS[precision]}" if suite == "gpu_flow" else mode
            yield Race(suite, case.name, label, names, partial(_flow, case, mode, precision))


def _flow(case: FlowCase, mode: str, precision: str, name: str) -> Entry:
    """Calls with the host in them, and of some the kernels alone."""
    clock = gpu_races.clock
    torch.set_float32_matmul_precision(precision)
    made = _made(name, case, mode)
    work = partial(made.run, mode, *case.inputs(clock.DEVICE))
    for _ in range(3):  # what is captured at the second call is checked at the fourth
        work()
    if wrong := made.why_wrong(mode, case, precision):
        raise AssertionError(wrong)
    operations, size, rate = case.operations(mode), case.bytes(mode), clock.matrix_rate(precision)
    info: dict[str, Any] = {
        "batch": case.batch, "dim": case.dim, "hidden": case.hidden, "steps": case.steps, "precision": precision,
        "operations": operations, "bytes": size, "yardstick_s": max(operations / rate, size / clock.bandwidth()),
        "matrix_gflops": rate / 1e9, "threads": 1, "parameters": made.parameters(),
    }  # fmt: skip
    if name != "reduce-overhead" and not name.endswith(GRAPHED):  # whose memory belongs to their graphs
        info["peak_bytes"] = clock.peak_memory(work)

    def conclude(call: float, kernels: float) -> dict[str, float]:
        return {"gflops": operations / call / 1e9, "share_of_matrix_rate": operations / kernels / rate}

    return Entry(work, info, (lambda: [work]) if name in ALONE else None, conclude)


def _made(name: str, case: FlowCase, mode: str) -> Provider:
    """A provider of its own for each race: one that is captured must not share its gradients."""
    plain = name.removesuffix(GRAPHED)
    if reason := why_missing(plain, case):
        raise Missing(reason)
    made = provider(plain, case, mode in ("train", "step"), gpu_races.clock.DEVICE)
    return Replayed(made, gpu_races.clock.Graph) if name.endswith(GRAPHED) else made


WAYS = {"glf_fast": ("auto", False), "glf_fast reversible": ("auto", True), "eager": ("reference", False)}


def memory_races(depths: Sequence[int]) -> Iterator[Race]:
    """Peak memory of a training pass against depth."""
    for steps in depths:
        steps = min(steps, 2) if rehearsing() else steps
        yield Race("memory", f"memory-{steps}", "train", tuple(WAYS), partial(_memory, steps))


def _memory(steps: int, name: str) -> Entry:
    """D 64, H 256, 256, B 4,096, with its gradients already there."""
    clock, (backend, reversible) = gpu_races.clock, WAYS[name]
    batch = 4 if rehearsing() else 4096
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    model = CouplingFlow(64, steps, (256, 256), reversible=reversible).to(clock.DEVICE)
    x = torch.randn(batch, 64, device=clock.DEVICE)

    def work() -> None:
        with use_backend(backend):
            model.log_prob(x).mean().backward()

    work()
    with use_backend(backend):
        if wrong := wrong_gradients(model, x):
            raise AssertionError(wrong)
    info = {
        "batch": batch, "dim": 64, "hidden": (256, 256), "steps": steps, "peak_bytes": clock.peak_memory(work),
        "parameter_bytes": 4 * sum(p.numel() for p in model.parameters()),
    }  # fmt: skip
    model.requires_grad_(False)
    x.requires_grad_()
    info["activation_bytes"] = clock.peak_memory(work)
    model.requires_grad_()
    x.requires_grad_(False)
    return Entry(work, info)


def step_races() -> Iterator[Race]:
    """Whole training steps of the presets' models, as the trainer makes them, and the most memory that they hold."""
    names = tuple(name for name in STEP_PROVIDERS if not (name == "compile" and rehearsing()))
    for preset in IMAGES:
        yield Race("train_step", preset, "step", names, partial(_step, preset), seconds=1.0)


def _step(preset: str, name: str) -> Entry:
    torch.set_float32_matmul_precision("high")
    step = Step(name, preset, gpu_races.clock.DEVICE, batch=4 if rehearsing() else 0)
    if wrong := step.why_wrong("high"):  # cuDNN's convolutions are tf32 by default
        raise AssertionError(wrong)
    batch = len(step.images)
    info = {"batch": batch, "peak_extra_bytes": gpu_races.clock.peak_memory(step.run)}
    return Entry(step.run, info, conclude=lambda call, _: {"images_per_s": batch / call})


def launch_races(cases: Sequence[FlowCase]) -> Iterator[Race]:
    """By the profiler, which some virtual machines do not let in."""
    for mode in FLOW_MODES:
        for case in _sized(cases):
            names = (*OURS_AND_EAGER, *LIBRARIES)
            yield Race("launches", case.name, mode, names, partial(_launches, case, mode))


def _launches(case: FlowCase, mode: str, name: str) -> Entry:
    torch.set_float32_matmul_precision("high")
    made, device = _made(name, case, mode), gpu_races.clock.DEVICE
    if wrong := made.why_wrong(mode, case, "high"):
        raise AssertionError(wrong)
    number = gpu_races.clock.launches(partial(made.run, mode, *case.inputs(device)))
    if not number:
        raise AssertionError("the profiler saw no launches")
    return Entry(None, {"launches": number})


def warm_races(cases: Sequence[FlowCase]) -> Iterator[Race]:
    """Ours and those that are compiled, one pass and no time: what they leave in caches on disk makes the others short."""

    def enter(case: FlowCase, mode: str, name: str) -> Entry:
        torch.set_float32_matmul_precision("high")
        _made(name, case, mode).run(mode, *case.inputs(gpu_races.clock.DEVICE))
        return Entry(None, {})

    for mode in FLOW_MODES:
        for name in ("glf_fast", *COMPILED):
            for case in _sized(cases):
                yield Race("warm", case.name, mode, (name,), partial(enter, case, mode))


def _sized(cases: Sequence[FlowCase]) -> list[FlowCase]:
    """Three small ones in a rehearsal."""
    return [replace(case, steps=2, batch=min(case.batch, 8)) for case in cases[:3]] if rehearsing() else list(cases)
