"""Makes kernels/launch_table.json: how each flow kernel is launched.

    python tools/tune_flow.py                          # on a GPU: measures, and replaces that architecture's part
    python tools/tune_flow.py --compile-only --triton DIR     # without one: all architectures, by registers and spills
    python tools/tune_flow.py --compile-only --triton DIR --keep    # the same, but launches that are good enough stay

DIR holds another Triton than the installed one (pip install --no-deps --target DIR triton==…): launches are chosen over both.
Candidates stand in order of preference: large chunks (less to re-read) before small ones, few warps before many, the first of
two hidden layers in registers before memory. Compile-only takes the first one of which no kernel, of the entry or of the
named flows (kernels/shipped.py), spills more than KEEP bytes in any version, and which leaves room for two programs on a
multiprocessor; else the one that spills least.
Measuring takes the fastest of those that spill at most 2 SPILLS bytes: graph replays of 10 launches, median of 20.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from triton_resources import Compiler, Resources

from glf_fast.kernels import coupling_flow, coupling_flow_backward
from glf_fast.kernels.flow_options import FULL_PRECISION, FlowOptions
from glf_fast.kernels.launch_table import KERNELS, PRECISIONS, SIZES, Launch
from glf_fast.kernels.shipped import kernels, of_entry

TABLE = Path(coupling_flow.__file__).with_name("launch_table.json")
ARCHITECTURES = ("90", "80", "100")
SHARED = (
    96 << 10
)  # bytes a program: two on a multiprocessor from sm_80 on, one on the smaller ones of sm_86, 89 and 120
SPILLS = 128
KEEP = 64  # bytes spilled that are good enough: versions of ptxas differ by as much
SECTIONS = ("launches", "resources", "microseconds")  # of the table; resources: registers, spilled bytes, shared bytes

# Rows, columns and depth of chunks, warps.
FEW_ROWS = (
    (16, 64, 64, 4), (16, 64, 32, 4), (16, 32, 64, 4), (16, 32, 32, 4), (16, 32, 16, 4), (16, 16, 32, 4), (16, 16, 16, 4),
    (16, 64, 32, 8), (16, 32, 32, 8), (16, 32, 16, 8),
)  # fmt: skip
MANY_ROWS = (
    (128, 64, 64, 8), (64, 64, 64, 4), (64, 64, 32, 4), (64, 32, 32, 4), (64, 64, 64, 8), (64, 64, 32, 8), (64, 32, 32, 8),
    (32, 64, 64, 4), (32, 64, 32, 4), (32, 32, 32, 4), (32, 32, 16, 4), (32, 32, 32, 8), (32, 32, 16, 8),
)  # fmt: skip


def keys() -> Iterator[str]:
    """All keys of an architecture's part."""
    for parts in itertools.product(KERNELS, SIZES, PRECISIONS, ("few", "many")):
        yield " ".join(parts)


def candidates(key: str) -> Iterator[Launch]:
    """The launches to choose from, in order of preference."""
    kernel, size, _, batch = key.split()
    chunks: tuple[tuple[int, int, int, int], ...] = FEW_ROWS
    if batch == "many":
        chunks = {"large": MANY_ROWS[4:], "huge": MANY_ROWS[6:]}.get(size, MANY_ROWS) + FEW_ROWS
    # A first hidden layer of 512 is never kept: as an operand of 16 rows it takes 256 registers of every thread.
    kept = (False, True) if kernel == "forward" and size in ("small", "medium") else (True,)
    launches = [
        Launch(rows, columns, depth, staged, warps, num_stages=2)
        for rows, columns, depth, warps in chunks
        for staged in kept
    ]
    # One wave of short programs waits for its own barriers; many waves wait for weights, which larger tiles read less often.
    yield from sorted(launches, key=lambda how: how.staged) if batch == "few" else launches


def take(
    key: str, how: Launch, arch: str, compilers: list[Compiler], below: float
) -> tuple[int, dict[str, dict[str, Resources]]] | None:
    """The most that a kernel of this launch spills, and what each takes, by name and Triton version.

    None as soon as one does not compile, leaves no room for two programs, or spills no less than `below`.
    """
    most = 0
    found: dict[str, dict[str, Resources]] = {}
    for spec in kernels(key, how, int(arch)):
        for compiler in compilers:
            compiler.ask(spec, int(arch))
        answers = [compiler.answer() for compiler in compilers]
        found[spec.name] = {}
        for compiler, taken in zip(compilers, answers, strict=True):
            if taken is None or taken.shared > SHARED or taken.spills >= below:
                return None
            most = max(most, taken.spills)
            found[spec.name][compiler.version] = taken
    return most, found


def choose(
    key: str, arch: str, present: Launch | None, compilers: list[Compiler]
) -> tuple[Launch, dict[str, dict[str, Resources]]]:
    """By compiling alone: the launch, and what its kernels take. The `present` one stays if it spills at most KEEP bytes."""
    best: tuple[float, Launch, dict[str, dict[str, Resources]]] = (math.inf, Launch(0, 0, 0, True, 0, 0), {})
    for how in itertools.chain([present] if present else [], candidates(key)):
        if taken := take(key, how, arch, compilers, best[0]):
            best = (taken[0], how, taken[1])
        if best[0] <= KEEP:
            break
    assert best[2], f"nothing compiles for {key} on sm_{arch}"
    return best[1:]


def microseconds(run: Callable[[], Any]) -> float:
    """Of one call on the GPU: median of 20 replays of a graph of 10 calls."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            run()
    times = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / 10)
    return statistics.median(times)


def measure(key: str, how: Launch) -> float:
    """Microseconds of the key's largest flow, K = 8, at 256 or 65,536 rows."""
    kernel, size, precision, batch = key.split()
    dim, width = SIZES[size]
    widths = [dim // 2, *[width] * (4 if kernel == "deep" else 2), dim]
    rows, steps = 256 if batch == "few" else 65_536, 8
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    matrix = torch.linalg.qr(normal(steps, dim, dim)).Q.contiguous()
    weights = [normal(steps, n, m) / n**0.5 for n, m in itertools.pairwise(widths)]
    biases = [normal(steps, n) for n in widths[1:]]
    maps = FULL_PRECISION if precision == "bf16" else precision
    options = FlowOptions("relu", "tanh", 2.0, False, False, maps, precision)
    x, offset = normal(rows, dim), normal(steps, dim)
    if kernel != "backward":
        return microseconds(
            lambda: coupling_flow.flow_forward(x, matrix, offset, weights, biases, None, options, False, True, how)
        )
    _, logdet, saved = coupling_flow.flow_forward(x, matrix, offset, weights, biases, None, options, False, True)
    return microseconds(
        lambda: coupling_flow_backward.flow_backward(
            x, logdet, saved, matrix, None, offset, weights, biases, None, options, False, False, how
        )
    )


def fastest(key: str, arch: str, compiler: Compiler) -> tuple[Launch, dict[str, dict[str, Resources]], float]:
    """By measuring: the launch, what its entry's kernel takes, microseconds."""
    measured = []
    for how in candidates(key):
        taken = compiler.resources(of_entry(key, how), int(arch))
        if taken and taken.spills <= 2 * SPILLS and taken.shared <= 2 * SHARED:
            measured.append((measure(key, how), how, {key: {compiler.version: taken}}))
    took, how, found = min(measured)
    return how, found, took


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--arch", choices=ARCHITECTURES, help="this one alone; with --compile-only")
    parser.add_argument("--keep", action="store_true", help=f"keep launches that spill at most {KEEP} bytes")
    parser.add_argument("--out", type=Path, default=TABLE, help="where the table goes")
    parser.add_argument("--only", default="", help="keys that contain this, such as 'medium bf16'")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so many; what is measured is kept")
    parser.add_argument("--triton", action="append", default=[], help="folder with another Triton that must agree")
    arguments = parser.parse_args()
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {"made": {}, "launches": {}, "resources": {}}
    compilers = [Compiler(folder) for folder in (None, *arguments.triton)]
    versions = " and ".join(compiler.version for compiler in compilers)
    if arguments.compile_only:
        made, architectures = (
            f"compiled only, Triton {versions}; not measured",
            [arguments.arch] if arguments.arch else list(ARCHITECTURES),
        )
    else:
        major, minor = torch.cuda.get_device_capability()
        architectures = [f"{major}{minor}"]
        where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {versions}"
        made = f"the entries under microseconds: measured on {where}"
    end = time.monotonic() + 60 * arguments.minutes
    for arch in architectures:
        launches, taken, times = (table.setdefault(name, {}).setdefault(arch, {}) for name in SECTIONS)
        for key in keys():
            if arguments.only not in key or time.monotonic() > end:
                continue
            if arguments.compile_only:
                present = launches.get(key) if arguments.keep else None
                launches[key], found = choose(key, arch, present and Launch(*present), compilers)
            else:
                launches[key], found, times[key] = fastest(key, arch, compilers[0])
            for name, by_version in found.items():
                taken[name] = {version: list(r) for version, r in by_version.items()}
                print(f"sm_{arch}", name, launches[key], taken[name], times.get(key, ""), flush=True)
            table["made"][arch] = made
            arguments.out.write_text(_one_entry_a_line(table))
    for compiler in compilers:
        compiler.close()


def _one_entry_a_line(table: dict[str, Any]) -> str:
    sections = []
    for name, section in table.items():
        lines = []
        for arch, content in section.items():
            if isinstance(content, dict):
                rows = ",\n".join(f"   {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
                lines.append(f"  {json.dumps(arch)}: {{\n{rows}\n  }}")
            else:
                lines.append(f"  {json.dumps(arch)}: {json.dumps(content)}")
        sections.append(f" {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(sections) + "\n}\n"


if __name__ == "__main__":
    main()
