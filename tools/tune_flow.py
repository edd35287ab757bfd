"""Measures on a GPU how each flow kernel is launched best, and writes a launch table with what it finds.

    python tools/tune_flow.py --seconds 80 --out launch_table.json     # what is measured by then is in the table
    python tools/tune_flow.py --precompile                             # compiles what that would measure, and measures nothing

Both go through the keys that the benchmarks run, and through the most promising launches of each (flow_candidates.py).
A launch is compiled by the same route as a user's, in as many processes as there are processors, and found in Triton's cache
by whoever launches it later. So the cache can be filled beforehand and carried to another machine with the same Triton and
kind of GPU. Without a GPU, tools/stub_gpu.py runs `--precompile`.

Measured are graphs of 5 launches, replayed 10 times (large batches: for at least 15 ms), packing of parameters included,
which all launches of a key share; of the backward the kernel without the products for the gradients of weights. The best 5
are measured again, and the smaller of two times counts. A launch whose results are not those of the first one, which is the
committed table's, is dropped, and so is one that does not compile or fit; both are said.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as Late
from functools import cache, partial
from pathlib import Path

import launch_file
import torch
import triton
from flow_candidates import candidates, case, tuned_keys
from shipped import kernels, spline_constants
from torch import Tensor
from triton.runtime.errors import OutOfResources

from glf_fast.kernels import coupling_flow, coupling_flow_backward
from glf_fast.kernels.flow_options import FlowOptions, sizes
from glf_fast.kernels.launch_table import Launch, architecture

FIRST = 16  # launches of every key that are measured before the rest of any
AGAIN = 5
SECONDS = 0.015  # of one measurement, at least
HOPELESS = 2.0  # times the best one's time in a single call: not measured further
HOST = 1e3  # microseconds by which the host may delay a single call: assumed
# ‖difference‖/‖first result‖, from which on results are wrong. Launches differ in the order of their sums alone, and in what is
# then rounded otherwise: up to 6e-4, 2e-4 and 6e-7 of glf-cifar's results and gradients, emulated with sums of 8, 32 and 256.
# Matrix units truncate sums, which is some 10 times as much in float32. One wrong row in 256 is 6e-2.
TOLERANCE = {"bf16": 1e-2, "tf32": 4e-3, "tf32x3": 5e-4}

Run = Callable[[Launch, bool], list[Tensor]]


def runner(key: str, rows: int | None = None) -> Run:
    """A function that runs the key's flow, or its backward, with a launch; for True, with the products for weights.

    `rows` replaces the batch of the key.
    """
    flow = case(key)
    rows = rows or flow.rows
    spline = spline_constants(flow.bins)
    last = sizes(flow.dim, flow.hidden, 0, spline)["N_RAW"]
    widths = [flow.dim - flow.dim // 2, *flow.hidden, last]
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    matrix = torch.eye(flow.dim, device="cuda") + 0.1 * normal(flow.steps, flow.dim, flow.dim) / flow.dim**0.5
    # So that rounding is not amplified, last layers are small, as in a trained flow, and half of the ReLUs are on and half off
    # by a margin, or rounding would switch some.
    scales = [0.3 * n**-0.5 for n in widths[:-2]] + [0.1 * widths[-2] ** -0.5]
    weights = [s * normal(flow.steps, n, m) for s, n, m in zip(scales, widths, widths[1:], strict=False)]
    biases = [3.0 * normal(flow.steps, n).sign() for n in flow.hidden] + [0.1 * normal(flow.steps, widths[-1])]
    x, offset = normal(rows, flow.dim), 0.1 * normal(flow.steps, flow.dim)
    maps = "tf32" if flow.precision == "bf16" else flow.precision
    options = FlowOptions("relu", "tanh", 2.0, False, False, maps, flow.precision, spline)
    state, grads = normal(flow.steps, rows, flow.dim), (normal(rows, flow.dim), normal(rows))

    def forward(how: Launch, whole: bool) -> list[Tensor]:
        del whole
        return list(
            coupling_flow.flow_forward(x, matrix, offset, None, weights, biases, None, options, False, True, how)
        )

    def backward(how: Launch, whole: bool) -> list[Tensor]:
        return coupling_flow_backward.flow_backward(
            *grads, state, matrix, None, offset, weights, biases, None, options, False, whole, False, how
        )

    return backward if flow.backward else forward


@cache
def _small(key: str) -> Run:
    return runner(key, rows=16)


def _compile_only() -> None:
    """In a process that compiles: kernels are not launched, so that nothing disturbs what another process measures."""
    os.nice(5)
    triton.JITFunction.__getitem__ = lambda kernel, grid: partial(kernel.warmup, grid=grid)


def _compile(key: str, how: Launch) -> int:
    """Compile what a launch needs; the number of kernels that were not in the cache."""
    missed: list[bool] = []
    triton.knobs.compilation.listener = lambda **found: missed.append(not found["cache_hit"])
    _small(key)(how, False)
    return sum(missed)


Jobs = dict[tuple[str, Launch], "Future[int]"]


def compile_all(jobs: list[tuple[str, Launch]]) -> Jobs:
    """Begin to compile, in this order."""
    # One process imports torch, before anything uses the GPU, and the others are its copies.
    context = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(os.cpu_count(), mp_context=context, initializer=_compile_only)
    return {job: pool.submit(_compile, *job) for job in jobs}


def in_order(arch: str) -> Iterator[tuple[str, list[Launch]]]:
    """Keys and launches in the order in which they are compiled and measured."""
    for start, end in ((0, FIRST), (FIRST, None)):
        for key in tuned_keys():
            if launches := candidates(key, arch)[start:end]:
                yield key, launches


def precompile(arch: str, end: float) -> None:
    """Fill Triton's cache."""
    jobs = compile_all([(key, how) for key, launches in in_order(arch) for how in launches])
    started, compiled, failed = time.monotonic(), 0, 0
    for i, ((key, how), future) in enumerate(jobs.items(), 1):
        try:
            compiled += future.result(max(0.0, end - time.monotonic()))
        except Late:
            sys.exit(f"stopped after {i - 1} of {len(jobs)} launches: the time is over")
        except Exception as error:  # every pass of the compiler has its own kinds
            failed += 1
            print(f"{key} {list(how)} does not compile: {str(error).splitlines()[0]}", flush=True)
        if i % 20 == 0 or i == len(jobs):
            seconds = time.monotonic() - started
            print(
                f"{i}/{len(jobs)} launches, {compiled} kernels compiled, {failed} failed, {seconds:.0f} s", flush=True
            )
    for key in tuned_keys():  # the launchers, which are compiled for a kernel's arguments at its first launch
        _small(key)(candidates(key, arch)[0], False)


class Wrong(Exception):
    """A launch computes something else than the first one."""


class Key:
    """What is known of one key's launches."""

    def __init__(self, key: str, first: Launch) -> None:
        self.key = key
        self.run = runner(key)
        self.right = [t.clone() for t in self.run(first, True)]
        self.times: dict[Launch, float] = {}
        self.times[first] = self.measure(first)
        self.compiled = 0  # kernels that were not in the cache

    def check(self, how: Launch) -> None:
        """Compare a launch's results with the first one's."""
        tolerance = TOLERANCE[case(self.key).precision]
        for found, right in zip(self.run(how, True), self.right, strict=True):
            error, norm = (found - right).norm(), right.norm()
            if not error <= tolerance * norm:  # NaN is wrong, too
                raise Wrong(f"results differ by {error / norm:.1g} of their norm")

    def measure(self, how: Launch) -> float:
        """Microseconds of a launch: the median of replays of a graph, or of a single call where that says enough."""
        run = partial(self.run, how, False)
        once = _microseconds(run)
        if once > HOST + HOPELESS * min(self.times.values(), default=float("inf")):
            return once
        graph, launches = torch.cuda.CUDAGraph(), max(1, min(5, int(SECONDS / 10 * 1e6 / once)))
        with torch.cuda.graph(graph):
            for _ in range(launches):
                run()
        graph.replay()
        replays = max(3, min(10, int(SECONDS * 1e6 / (once * launches))))
        return statistics.median(_microseconds(graph.replay) / launches for _ in range(replays))

    def consider(self, how: Launch, compiled: Future[int], end: float) -> None:
        """Check and measure a launch as soon as it is compiled; say why where it is dropped."""
        if how in self.times:
            return
        why = ""
        try:
            self.compiled += compiled.result(max(0.0, end - time.monotonic()))
        except Late:
            return
        except Exception as error:  # every pass of the compiler has its own kinds
            why = f"does not compile: {error}"
        try:
            if not why:
                self.check(how)
                self.times[how] = self.measure(how)
        except (OutOfResources, Wrong) as error:
            why = str(error)
        if why:
            print(f"{self.key} {list(how)} dropped: {why}", flush=True)

    def best(self, n: int) -> Launch:
        """The fastest launch, after another measurement of the best n."""
        for how in sorted(self.times, key=self.times.__getitem__)[:n]:
            self.times[how] = min(self.times[how], self.measure(how))
        return min(self.times, key=self.times.__getitem__)


def _microseconds(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end)


def _warm_up() -> None:
    """Half a second of products: an idle GPU's clock is low."""
    a = torch.randn(4096, 4096, device="cuda")
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        a @ a
        torch.cuda.synchronize()


def tune(arch: str, end: float, out: Path) -> None:
    """Measure until `end`, and write the table after every key."""
    table = launch_file.read()
    launches, resources, microseconds = (
        table[name].setdefault(arch, {}) for name in ("launches", "resources", "microseconds")
    )
    versions = f"torch {torch.__version__}, Triton {triton.__version__}"
    compiled_before = table["made"].get(arch, "")
    table["made"][arch] = f"{compiled_before}; under microseconds: {torch.cuda.get_device_name()}, {versions}"
    launch_file.write(out, table)
    jobs = compile_all([(key, how) for key, hows in in_order(arch) for how in hows])
    _warm_up()
    known: dict[str, Key] = {}
    for key, hows in in_order(arch):
        present = Launch(*launches[key])
        if key not in known:
            known[key] = Key(key, present)
        one = known[key]
        for how in hows:
            if time.monotonic() > end:
                break
            one.consider(how, jobs[key, how], end)
        best = one.best(AGAIN)
        launches[key], microseconds[key] = list(best), round(one.times[best], 2)
        if best != present:  # these are of a launch that is no more
            for spec in kernels(key, best, int(arch)):
                resources.pop(spec.name, None)
        launch_file.write(out, table)
        gain = one.times[present] / one.times[best]
        print(
            f"{key:28} {list(best)!s:32} {microseconds[key]:9.1f} µs, best of {len(one.times)}; "
            f"{gain:.2f} times as fast as {list(present)}",
            flush=True,
        )
        if time.monotonic() > end:
            break
    missing = [key for key in tuned_keys() if key not in known]
    compiled = sum(one.compiled for one in known.values())
    late = f"; no time for {', '.join(missing)}" if missing else ""
    print(f"{len(known)} keys measured, for which {compiled} kernels were compiled{late}", flush=True)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precompile", action="store_true", help="compile what would be measured, and measure nothing")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so many seconds")
    parser.add_argument("--out", type=Path, default=launch_file.TABLE, help="where the table goes")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA GPU is visible; tools/stub_gpu.py runs --precompile without one")
    end = time.monotonic() + arguments.seconds
    arch = architecture(torch.cuda.current_device())
    try:
        if arguments.precompile:
            precompile(arch, end)
        else:
            tune(arch, end, arguments.out)
    finally:
        for process in multiprocessing.active_children():
            process.kill()


if __name__ == "__main__":
    main()
