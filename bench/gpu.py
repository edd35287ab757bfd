"""The flows on a GPU: `python -m bench.gpu OUT [--seconds 200]`. Results go to OUT/gpu.json, the most important first.

Providers: ours; the reference in plain PyTorch; the same under torch.compile, in its reduce-overhead mode, and captured as a
CUDA graph. A provider whose values are not those of the float64 reference is reported as wrong, and not timed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import glf_fast
from bench import timing
from bench.cases import FLOWS, SMALL_BATCH, FlowCase
from bench.linear import BACKENDS, Linear, LinearCase, why_missing
from glf_fast import CouplingFlow, ops

__all__ = ["main"]

PRECISIONS = {"highest": 2e-5, "high": 4e-3, "medium": 4e-2}  # torch's matmul precision → error that is rounding
Work = Callable[[], Any]


def machine() -> dict[str, Any]:
    """What a number needs beside it."""
    folder = Path(__file__).parent
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True)
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "cores": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python_version": platform.python_version(),
        "glf_fast": glf_fast.__version__,
        "backends": glf_fast.backends(),
        "commit": commit.stdout.strip() or "unknown",
    }


def providers(case: FlowCase, mode: str) -> Iterator[tuple[str, Work]]:
    """(name, a pass of `mode`); passes return what is compared."""
    x, context = case.inputs("cuda")
    compilers: tuple[tuple[str, str, dict[str, Any] | None], ...] = (
        ("glf_fast", "auto", None),
        ("eager", "reference", None),
        ("compile", "reference", {}),
        ("reduce-overhead", "reference", {"mode": "reduce-overhead"}),
    )
    for name, backend, compiler in compilers:
        # Data → noise in training mode, where nothing is kept between calls: as the other providers have it.
        flow = case.flow("cuda")
        function: Callable[..., Any] = flow.inverse if mode == "sample" else flow.log_prob
        if compiler is not None:
            function = torch.compile(function, dynamic=False, **compiler)
        yield name, partial(a_pass, mode, function, backend, x, context, [*flow.parameters()])


def a_pass(
    mode: str, function: Callable[..., Any], backend: str, x: Tensor, context: Tensor | None, parameters: list[Tensor]
) -> Any:
    """What is timed: gradients of the mean log-density, log-densities, or the samples that the noise x becomes."""
    torch.compiler.cudagraph_mark_step_begin()
    with glf_fast.use_backend(backend):
        if mode == "train":
            return torch.autograd.grad(-function(x, context).mean(), parameters)
        with torch.no_grad():
            out = function(x, context)
        return out[0] if mode == "sample" else out


def exact(case: FlowCase, mode: str, rows: int) -> Any:
    """The same pass by the float64 reference, of the first rows."""
    flow = case.flow("cuda").double()
    x, context = case.inputs("cuda")
    x, context = x[:rows].double(), None if context is None else context[:rows].double()
    function = flow.inverse if mode == "sample" else flow.log_prob
    return a_pass(mode, function, "reference", x, context, [*flow.parameters()])


def wrong(found: Any, expected: Any, tolerance: float) -> str:
    """Why a pass is not what it should be, or ""."""
    if expected is None:
        return "" if all(t.isfinite().all() for t in found) else "not finite"
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found[: len(expected)], expected)]
    for i, (a, b) in enumerate(pairs):
        error = ((a.double() - b).norm() / b.norm().clamp(min=1e-12)).item()
        if not error < tolerance:
            return f"result {i} is off by {error:.1e}"
    return ""


def measure(case: FlowCase, mode: str, precision: str, seconds: float) -> Iterator[dict[str, Any]]:
    """A row a provider."""
    torch.set_float32_matmul_precision(precision)
    rows = min(case.batch, 4096)
    expected = exact(case, mode, rows) if mode != "train" or case.batch == rows else None
    rate = timing.matrix_rate(torch.bfloat16 if precision == "medium" else torch.float32)
    floor = max(case.operations(mode) / rate, case.bytes(mode) / timing.bandwidth())
    for name, work in providers(case, mode):
        info: dict[str, Any] = {
            "case": case.name, "mode": mode, "provider": name, "batch": case.batch, "precision": precision,
            "operations": case.operations(mode), "bytes": case.bytes(mode), "floor_s": floor,
            "matrix_gflops": rate / 1e9, "threads": 1,
        }  # fmt: skip
        try:
            found = work()
            if reason := wrong(found, expected, PRECISIONS[precision]):
                yield {"info": {**info, "wrong": reason}, "stats": {}}
                continue
            calls, host = timing.call_times(work, seconds)
            info |= {"host_s": host, "peak_bytes_gpu": timing.peak_memory(work)}
            if name in ("glf_fast", "eager"):
                info["launches"] = timing.launches(work)
                graph = timing.Graph(work)
                for cold in (True, False):
                    replays = graph.times(seconds, cold=cold)
                    info[f"graph_{'cold' if cold else 'warm'}"] = stats(replays)
            yield {"info": finish(info, calls), "stats": stats(calls)}
            if name == "eager":
                replays = graph.times(seconds, cold=False)
                yield {"info": finish({**info, "provider": "graphed eager"}, replays), "stats": stats(replays)}
        except Exception as error:  # one provider that fails must not cost the others' results
            yield {"info": {**info, "wrong": f"{type(error).__name__}: {str(error)[:300]}"}, "stats": {}}
        torch.compiler.reset()


def finish(info: dict[str, Any], times: list[float]) -> dict[str, Any]:
    """With the rates that a time means."""
    rate = info["operations"] / statistics.median(times) / 1e9
    return {**info, "gflops": rate, "share_of_matrix_rate": rate / info["matrix_gflops"]}


def stats(times: list[float]) -> dict[str, float]:
    """As in the other result files."""
    q1, median, q3 = statistics.quantiles(times, n=4)
    return {"min": min(times), "q1": q1, "median": median, "q3": q3, "max": max(times), "rounds": len(times)}


def elementwise(seconds: float) -> Iterator[dict[str, Any]]:
    """The elementwise coupling of images, in both orders of memory: share of a copy's bandwidth."""
    for shape in ((64, 12, 16, 16), (64, 24, 8, 8), (64, 48, 4, 4), (4096, 24, 16, 16)):
        for order, name in ((torch.contiguous_format, "NCHW"), (torch.channels_last, "NHWC")):
            for mode, (work, numbers) in couplings(shape, order).items():
                for backend, provider in (("auto", "glf_fast"), ("reference", "eager")):
                    with glf_fast.use_backend(backend):
                        replays = timing.Graph(work).times(seconds, cold=True)
                    size = 4 * numbers
                    info = {
                        "case": f"coupling {'x'.join(map(str, shape))} {name}", "mode": mode, "provider": provider,
                        "bytes": size, "floor_s": size / timing.bandwidth(),
                        "share_of_bandwidth": size / statistics.median(replays) / timing.bandwidth(),
                    }  # fmt: skip
                    yield {"info": info, "stats": stats(replays)}


def linears(seconds: float) -> Iterator[dict[str, Any]]:
    """log|det| and inverse of dense matrices: ours, each library under torch.linalg, CuPy; a graph where one can be made."""
    for case in (
        LinearCase(count, dim) for count in (8, 32, 1024, 16384) for dim in (4, 8, 16, 32, 48, 64, 96, 128, 192)
    ):
        size = case.bytes("forward")
        floor = max(size / timing.bandwidth(), case.operations("forward") / timing.matrix_rate(torch.float32))
        for name in ("glf_fast", *BACKENDS, "CuPy"):
            info: dict[str, Any] = {
                "case": case.name, "mode": "forward", "provider": name, "batch": case.count, "dim": case.dim,
                "bytes": size, "floor_s": floor,
            }  # fmt: skip
            if reason := why_missing(name, "cuda", "forward"):
                yield {"info": {**info, "wrong": reason}, "stats": {}}
                continue
            try:
                linear = Linear(name, case, "cuda")
                if reason := linear.why_wrong("forward"):
                    yield {"info": {**info, "wrong": reason}, "stats": {}}
                    continue
                calls, host = timing.call_times(partial(linear.run, "forward"), seconds)
                info |= {"host_s": host, "call_s": statistics.median(calls)}
                if name == "glf_fast":  # the others wait for the GPU, or copy to it, which no graph can hold
                    calls = timing.Graph(partial(linear.run, "forward")).times(seconds, cold=True)
                yield {"info": info, "stats": stats(calls)}
            except Exception as error:  # a library that this torch is built without
                yield {"info": {**info, "wrong": f"{type(error).__name__}: {str(error)[:300]}"}, "stats": {}}
    torch.backends.cuda.preferred_linalg_library("default")


def couplings(shape: tuple[int, ...], order: torch.memory_format) -> dict[str, tuple[Work, int]]:
    """Mode → a pass, and how many numbers it must read and write: u and t are the halves of one network's output."""
    x = torch.randn(shape, device="cuda").to(memory_format=order)
    raw = torch.randn((shape[0], 2 * shape[1], *shape[2:]), device="cuda").to(memory_format=order)
    v, u, t = (y.detach().requires_grad_() for y in (x, *raw.chunk(2, 1)))
    w, logdet = ops.affine_coupling(v, u, t)
    grads = (torch.randn_like(w), torch.randn_like(logdet))

    def forward() -> Any:
        with torch.no_grad():
            return ops.affine_coupling(v, u, t)

    def both() -> Any:
        return torch.autograd.grad(ops.affine_coupling(v, u, t), (v, u, t), grads)

    return {"forward": (forward, 4 * x.numel()), "forward and backward": (both, 11 * x.numel())}


def memory() -> Iterator[dict[str, Any]]:
    """Peak memory of a training pass against depth (D 64, H 256, B 4,096)."""
    for steps in (8, 64):
        for name, backend, reversible in (
            ("glf_fast", "auto", False),
            ("glf_fast reversible", "auto", True),
            ("eager", "reference", False),
        ):
            flow = CouplingFlow(64, steps, (256, 256), reversible=reversible).cuda()
            x = torch.randn(4096, 64, device="cuda")
            flow(x)
            parameters = list(flow.parameters())

            def work(flow: CouplingFlow = flow, x: Tensor = x, parameters: list[Any] = parameters) -> Any:
                return torch.autograd.grad(-flow.log_prob(x).mean(), parameters)

            with glf_fast.use_backend(backend):
                peak, (calls, _) = timing.peak_memory(work), timing.call_times(work, 0.3)
            info = {"case": f"memory-{steps}", "mode": "train", "provider": name, "batch": 4096, "peak_bytes": peak}
            yield {"info": info, "stats": stats(calls)}


def jobs(each: float) -> Iterator[Iterator[dict[str, Any]]]:
    """All measurements, the most important first."""
    for precision in ("high", "medium", "highest"):
        for mode in ("train", "log_prob", "sample"):
            for name in ("glf-cifar", "glf-mnist", "sbi"):
                yield measure(FLOWS[name], mode, precision, each)
        if precision == "high":
            yield memory()
            yield elementwise(each)
            yield linears(each / 2)
        yield measure(FLOWS["throughput"], "train", precision, each)
        yield measure(FLOWS["throughput"], "log_prob", precision, each)
        yield measure(FLOWS["wide"], "train", precision, each)
        for case in SMALL_BATCH.values():
            for mode in ("log_prob", "sample"):
                yield measure(case, mode, precision, each)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=200.0, help="stop after so many; what is there is kept")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench.gpu needs a CUDA GPU; on a processor: make bench")
    arguments.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + arguments.seconds
    date = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
    rows: list[dict[str, Any]] = []
    for job in jobs(0.3):
        for row in job:
            rows.append(row)
            info = row["info"]
            took = f"{row['stats']['median'] * 1e6:10.1f} µs" if row["stats"] else info.get("wrong", "")
            print(
                f"{info['case']:32} {info['mode']:22} {info.get('precision', ''):8} {info['provider']:18} {took}",
                flush=True,
            )
            content = {"machine": machine(), "date": date, "results": [{"name": "", **r} for r in rows]}
            (arguments.out / "gpu.json").write_text(json.dumps(content, indent=1) + "\n")
            if time.monotonic() > end:
                print("out of time; the rest was not measured", flush=True)
                return


if __name__ == "__main__":
    main()
