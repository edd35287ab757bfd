"""What the kernels of small flows take, from their machine code: instructions of a step, and predicted microseconds.

    python tools/small_flow_costs.py

compiles tests/csrc/flow_path.cu for sm_90 by nvcc and prints what it finds for each precision. A warp has a scheduler for
itself as long as a multiprocessor has four warps or fewer, and issues an instruction a clock at best. The matrix unit takes
ISSUE clocks for one of its own. The least time is the longer of both. In the most, nothing overlaps, and every product,
exponential and load of a step is waited for. Figures are those of tools/flow_costs.py, for an H100 at 1.755 GHz, assumed,
not measured.
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import triton
from flow_costs import PROCESSORS, Case, clocks

from glf_fast.kernels import launch_table

ROOT = Path(__file__).parents[1]
CLOCK = 1.755e3  # clocks a microsecond
ISSUE = 6.5  # clocks of a matrix unit for an instruction
CHAIN = 24  # clocks until its result can be used
PRODUCTS = (
    5  # one behind the other in a step, either way: map, three layers, and the coupling's exponentials in their place
)
EXPOSED = 300  # clocks of loads from L2 that a step of the backward waits for
LAUNCH = 2.0  # microseconds of a node of a graph
ROWS = 16  # of a warp
PRECISIONS = {
    "float32": (0, 0),
    "tf32": (1, 1),
    "bf16": (0, 2),
}  # of maps and MLPs, as csrc/cuda/row_tiles.cuh numbers them


class Code(NamedTuple):
    """A kernel's instructions, at their addresses, with their arguments."""

    name: str
    lines: Sequence[tuple[int, str, str]]

    def count(self, *names: str) -> int:
        """Instructions that begin with any of these names; all of them without one."""
        return sum(not names or op.startswith(names) for _, op, _ in self.lines)

    def between(self, first: int, last: int) -> Code:
        """The part at these addresses."""
        return Code(self.name, [line for line in self.lines if first <= line[0] <= last])

    def loops(self) -> list[Code]:
        """The loops that have matrix instructions, in the order of their ends.

        Retries of a barrier's wait lie out of line. They return into a loop and seem to make a longer one of it, so that of
        those that begin together the shortest is taken.
        """
        found: dict[int, Code] = {}
        for at, op, arguments in self.lines:
            target = re.search(r"0x([0-9a-f]+)", arguments) if op.startswith("BRA") else None
            if target and (start := int(target[1], 16)) < at:
                code = self.between(start, at)
                if code.count("HMMA"):
                    found.setdefault(start, code)
        return list(found.values())


def compiled(precision: str, architecture: int, folder: Path, source: str = "flow_path") -> tuple[Code, Code]:
    """The forward and the gradient kernel of tests/csrc/flow_path.cu, or of cluster_path.cu."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    map_, mlp = PRECISIONS[precision]
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    cubin = folder / f"{source}-{precision}-{architecture}.cubin"
    options = ["-std=c++17", "-O3", code, f"-I{ROOT / 'csrc'}", f"-DMAP={map_}", f"-DMLP={mlp}", "-cubin"]
    subprocess.run([nvcc, *options, ROOT / "tests" / "csrc" / f"{source}.cu", "-o", cubin], check=True)
    kernels = {code.name: code for code in disassembled(cubin)}
    forward, gradient = (
        next(c for name, c in kernels.items() if f"_{way}_kernel" in name) for way in ("forward", "gradient")
    )
    return forward, gradient


def disassembled(cubin: Path) -> Iterator[Code]:
    """The kernels of a compiled file."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    said = subprocess.run([tool, "-sass", cubin], check=True, capture_output=True, text=True).stdout
    for name, body in re.findall(r"Function : (\w+)(.*?)(?=Function : |\Z)", said, flags=re.S):
        lines = re.findall(
            r"^\s+/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?);", body, flags=re.M
        )
        yield Code(name, [(int(at, 16), op, arguments) for at, op, arguments in lines])


class Step(NamedTuple):
    """Instructions that a warp issues in a step, and those of them that are the matrix unit's."""

    instructions: int
    products: int
    exposed: int = 0

    def clocks(self) -> tuple[float, float]:
        """The least and the most."""
        unit = self.products * ISSUE
        most = self.instructions + unit - self.products + PRODUCTS * CHAIN + self.exposed
        return max(self.instructions, unit), most


def steps(forward: Code, gradient: Code) -> dict[str, Step]:
    """Of the forward, of one that keeps what the backward needs, and of the backward: without a context.

    What the hidden layers have in common is counted once, as for a single one; each kind of product is counted once, as for
    two.
    """
    plain, of_both = forward.loops(), gradient.loops()
    step, keeping = _step(plain), _step(of_both)
    context = min(plain, key=lambda code: code.count("HMMA"))
    context_gradient = min(
        (code for code in of_both if code.lines[0][0] > keeping.lines[-1][0]), key=lambda code: code.count("HMMA")
    )
    around = forward.count() - step.count()  # what loads and stores rows, in both kernels
    back = Step(
        gradient.count() - keeping.count() - around - context_gradient.count(),
        gradient.count("HMMA") - keeping.count("HMMA") - context_gradient.count("HMMA"),
        EXPOSED,
    )
    without = (context.count(), context.count("HMMA"))
    return {
        "forward": Step(step.count() - without[0], step.count("HMMA") - without[1]),
        "forward that keeps": Step(keeping.count() - without[0], keeping.count("HMMA") - without[1]),
        "backward": back,
    }


def _step(loops: Sequence[Code]) -> Code:
    """The first loop around another one, of a layer or a context: that over the steps of the forward."""
    inner = loops[0]
    return next(code for code in loops if code.lines[0][0] < inner.lines[0][0] and code.count("MUFU"))


class Pass(NamedTuple):
    """The parts of a pass, one after the other, and its launches with that which packs the parameters."""

    parts: tuple[str, ...]
    launches: int


# Products for the gradients of weights come on top, as they do for Triton's kernels.
PASSES = {
    "log_prob": Pass(("forward",), 2),
    "gradients": Pass(("forward that keeps", "backward"), 3),
    "gradients, both ways in one launch": Pass(("forward that keeps", "backward"), 2),
}


def microseconds(found: dict[str, Step], steps: int, rows: int) -> dict[str, tuple[float, float]]:
    """What each of PASSES takes of a flow with so many steps: the least and the most.

    Of the warps that share a scheduler, all but one only add what they keep it, or the matrix unit, busy.
    """
    sharing = math.ceil(math.ceil(math.ceil(rows / ROWS) / PROCESSORS) / 4)
    times = {}
    for name, (parts, launches) in PASSES.items():
        busy, alone = (steps * sum(found[part].clocks()[end] for part in parts) for end in (0, 1))
        least, most = busy * sharing, alone + busy * (sharing - 1)
        times[name] = launches * LAUNCH + least / CLOCK, launches * LAUNCH + most / CLOCK
    return times


def tritons(precision: str, steps: int, rows: int) -> dict[str, float]:
    """The same by Triton's kernels, whose predictions are single numbers: D 20, two hidden layers of 64, from the launch table.

    Each direction packs its parameters, and the backward's sums over rows are a launch, too.
    """
    dim, hidden = 20, (64, 64)
    operands = "tf32x3" if precision == "float32" else precision
    launches = dict(launch_table.entries(90))

    def took(backward: bool) -> float:
        how = launches[launch_table.key_for(backward, dim, hidden, operands, rows)]
        return clocks(Case(backward, dim, hidden, steps, rows, operands), how) / CLOCK

    forward = took(False)
    return {"log_prob": forward + 2 * LAUNCH, "gradients": forward + took(True) + 5 * LAUNCH}


def main() -> None:
    """Prints instructions and times."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for precision in PRECISIONS:
            found = steps(*compiled(precision, 90, Path(folder)))
            print(precision)
            for name, step in found.items():
                print(f"  {name}: {step.instructions} instructions a step, {step.products} products")
            for rows in (256, 16_384):
                theirs = tritons(precision, 8, rows)
                for name, (least, most) in microseconds(found, 8, rows).items():
                    beside = f"; by Triton's kernels {theirs[name]:.0f} µs" if name in theirs else ""
                    print(f"  {name}, 8 steps, {rows} rows: {least:.0f} to {most:.0f} µs{beside}")


if __name__ == "__main__":
    main()
