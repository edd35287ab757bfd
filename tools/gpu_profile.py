"""Nsight Compute's view of the kernels, in numbers: `python tools/gpu_profile.py OUT`. Writes OUT/profile.json.

The flow's forward and backward at 256 rows (glf-cifar), a small flow's (glf-mnist), log|det| and inverse of 16,384 matrices
of 32 × 32, the elementwise coupling of (4096, 24, 16, 16), channels-last, and the flow's forward and backward at 8,192
rows. Of each: duration, registers, shared memory, blocks, what is issued of what could be, occupancy, bytes of L2 and of
memory, and the reasons for which warps wait, the most important first. OUT/profile.ncu-rep keeps all that ncu saw (`--set
full`). Clocks are left as they are.

    python tools/gpu_profile.py OUT --rehearse     # makes the calls alone, on a processor in Triton's interpreter
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["key_numbers", "main"]

# ncu's name → ours. A name that a version of ncu does not have is left out.
NUMBERS = {
    "gpu__time_duration.sum": "duration",
    "launch__registers_per_thread": "registers",
    "launch__occupancy_limit_registers": "blocks by registers",
    "launch__occupancy_limit_shared_mem": "blocks by shared memory",
    "launch__shared_mem_per_block_dynamic": "shared memory",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue slots used",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps active",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "matrix units",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "matrix units' cycles",
    "smsp__inst_executed.sum": "instructions",
    "lts__t_bytes.sum": "bytes of L2",
    "lts__t_sector_hit_rate.pct": "hits in L2",
    "dram__bytes_read.sum": "bytes read from memory",
    "dram__bytes_write.sum": "bytes written to memory",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory's throughput",
    "smsp__cycles_active.avg": "cycles",
}
STALL, OF_ISSUE = "smsp__average_warps_issue_stalled_", "_per_issue_active.ratio"
KERNELS = "regex:flow_kernel|flow_backward|flow_gradient|slogdet_inverse|row_products|coupling_kernel|coupling_backward"


def key_numbers(text: str) -> list[dict[str, Any]]:
    """Of each kernel in the output of `ncu --import FILE --csv --page raw`: names, units below them, a row a kernel."""
    rows = list(csv.reader(line for line in text.splitlines() if line.startswith('"')))
    if len(rows) < 3:
        return []
    names, units = rows[0], dict(zip(rows[0], rows[1], strict=True))
    found = []
    for row in rows[2:]:
        values = dict(zip(names, row, strict=True))
        numbers = {ours: _with_unit(values[name], units[name]) for name, ours in NUMBERS.items() if values.get(name)}
        stalls = {
            name.removeprefix(STALL).removesuffix(OF_ISSUE): _number(value)
            for name, value in values.items()
            if name.startswith(STALL) and name.endswith(OF_ISSUE) and value
        }
        most = sorted(((s, n) for n, s in stalls.items() if isinstance(s, float) and s > 0), reverse=True)
        found.append(
            {"kernel": values["Kernel Name"], "grid": values["Grid Size"], "block": values["Block Size"]}
            | numbers
            | {"warps waiting for": {name: round(share, 3) for share, name in most[:8]}}
        )
    return found


def _number(text: str) -> float | str:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text


def _with_unit(text: str, unit: str) -> float | str:
    value = _number(text)
    return f"{value:g} {unit}" if unit and isinstance(value, float) else value


def calls(device: str, small: bool) -> Iterator[Callable[[], object]]:
    """The passes that are looked at."""
    import torch

    from bench import coupling, gpu_clock, linear, rehearsal
    from bench.cases import FLOWS, CouplingCase, FlowCase
    from bench.linear import LinearCase

    rehearsed = FlowCase("small", 8, (16, 16), 2, 4)

    def train(name: str, rows: int) -> Callable[[], object]:
        case = rehearsed if small else FLOWS[name]
        flow = case.flow(device)
        x = 0.5 + 1.5 * torch.randn(2 if small else rows, case.dim, device=device)
        return lambda: torch.autograd.grad(-flow.log_prob(x).mean(), list(flow.parameters())[:1])

    yield train("glf-cifar", 256)
    yield train("glf-mnist", 256)
    clock = rehearsal if small else gpu_clock
    dense = LinearCase(2, 5) if small else LinearCase(16384, 32)
    yield linear.PROVIDERS["glf_fast"].job(dense, "forward", clock).run
    images = CouplingCase((2, 4, 4, 4) if small else (4096, 24, 16, 16), "channels-last")
    yield coupling.PROVIDERS["glf_fast"].job(images, "train", clock).run
    yield train("glf-cifar", 8192)  # last: it has several launches, for as many as there is time


def work(rehearse: bool) -> None:
    """Make each call once to compile it, then once between the marks of the profiler."""
    import torch

    from glf_fast import use_backend

    torch.set_float32_matmul_precision("high")
    with use_backend("triton" if rehearse else "auto"):
        for call in calls("cpu" if rehearse else "cuda", rehearse):
            call()
            if not rehearse:
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
                call()
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--work", action="store_true", help="Only make the calls, as ncu is to see them.")
    parser.add_argument("--rehearse", action="store_true", help="On a processor, without ncu.")
    arguments = parser.parse_args()
    if arguments.work or arguments.rehearse:
        work(arguments.rehearse)
        return
    ncu = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    if not Path(ncu).is_file():
        sys.exit("ncu is not here")
    report = arguments.out / "profile"
    this = [sys.executable, __file__, str(arguments.out), "--work"]
    # Each launch is replayed 40 times, which takes a second or so.
    choice = ["--profile-from-start", "off", "--kernel-name", KERNELS, "--launch-count", "12"]
    done = subprocess.run([ncu, "--set", "full", "--clock-control", "none", *choice, "-f", "-o", str(report), *this])
    page = [ncu, "--import", f"{report}.ncu-rep", "--csv", "--page", "raw"]
    text = subprocess.run(page, capture_output=True, text=True).stdout
    found = key_numbers(text)
    (arguments.out / "profile.json").write_text(json.dumps(found, indent=1) + "\n")
    for kernel in found:
        waits = ", ".join(f"{name} {share}" for name, share in list(kernel["warps waiting for"].items())[:3])
        print(
            f"{kernel['kernel'][:40]:40} {kernel.get('duration', '')}, {kernel.get('registers')} registers; waits: {waits}"
        )
    if done.returncode or not found:
        sys.exit(f"ncu ended with {done.returncode}, and saw {len(found)} kernels")


if __name__ == "__main__":
    main()
