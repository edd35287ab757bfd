"""Kernels are compiled for real GPUs, without one: `make gate` does all of them, with two Triton versions."""

import os
import subprocess
import sys
from pathlib import Path

import forked
import shipped
from compile_gate import complaint
from triton_resources import Resources

from bench.cases import FLOWS, MASKED

TOOLS = Path(__file__).parents[2] / "tools"
# A process of its own: where kernels are interpreted they cannot be compiled.
COMPILED = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def test_figures_beyond_a_bound_are_refused() -> None:
    assert not complaint(Resources(255, 64, 99 << 10, 2), 80, 0, False)
    assert not complaint(Resources(255, 64, 227 << 10, None), 90, 0, False)
    assert "does not compile" in complaint(None, 80, 0, False)
    assert "256 registers" in complaint(Resources(256, 0, 0, 2), 90, 0, False)
    assert "65 bytes spilled; the launch was chosen at 0" in complaint(Resources(255, 65, 0, 2), 90, 0, False)
    assert "sm_80 has" in complaint(Resources(128, 0, (99 << 10) + 1, 2), 80, 0, False)


def test_loops_that_wait_for_their_loads_are_refused_unless_they_were_measured() -> None:
    for buffers in (0, 1):
        assert f"{buffers} buffers" in complaint(Resources(128, 0, 0, buffers), 90, 0, False)
        assert not complaint(Resources(128, 0, 0, buffers), 90, 0, True)


def test_stages_are_counted_as_buffers() -> None:
    # One stage: products read what the same iteration loaded. Two: its copy starts when they are done. A loop over chunks in
    # the forward's steps, loops in loops in the backward's.
    code = """
from glf_fast.kernels.launch_table import Launch
from shipped import of_entry
from triton_resources import resources
for key in ("forward small tf32 few", "backward small bf16 few"):
    for stages in (1, 2, 3):
        found = resources(of_entry(key, Launch(16, 32, 32, key.startswith("backward"), 4, stages)), 90)
        assert found.buffers == stages - 1, (key, stages, found)
"""
    done = forked.compiler(code)
    assert done.returncode == 0, done.stderr


def test_a_small_kernel_compiles_for_every_architecture() -> None:
    code = """
import compile_gate
from glf_fast.kernels.launch_table import Launch
from shipped import of_entry
from triton_resources import resources
spec = of_entry("forward small bf16 few", Launch(16, 32, 32, False, 4, 3))
for arch in compile_gate.ARCHITECTURES:
    why = compile_gate.complaint(resources(spec, arch), arch, 0, False)
    assert not why, why
"""
    done = forked.compiler(code)
    assert done.returncode == 0, done.stderr


def test_operands_of_tf32_products_are_rounded() -> None:
    # Rows by the flow's kernels, on their way into every product; parameters when they are packed.
    code = """
from glf_fast.kernels.launch_table import Launch
from shipped import beside, of_entry
from pipelines import PRODUCTS, loops
from triton_resources import compiled

def rounded(operand):
    while operand and operand.name.startswith("ttg."):  # moved into another layout
        operand = operand.operands[0]
    return operand is not None and "cvt.rna.tf32.f32" in operand.text

for key in ("forward small tf32 few", "backward small tf32 few"):
    ttgir = compiled(of_entry(key, Launch(16, 32, 32, key.startswith("backward"), 4, 3)), 80).asm["ttgir"]
    rows = [operation.operands[0] for loop in loops(ttgir) for operation in loop.operations if operation.name in PRODUCTS]
    rows = [operand for operand in rows if operand]  # without those that a loop carries from one iteration to the next
    assert len(rows) >= 8 and all(map(rounded, rows)), (key, [operand.text for operand in rows])
packings = [spec for spec in beside() if "glf-mnist high packing" in spec.name]
assert len(packings) == 2
for spec in packings:
    assert "cvt.rna.tf32.f32" in compiled(spec, 80).asm["ptx"]
"""
    done = forked.compiler(code)
    assert done.returncode == 0, done.stderr


def test_a_thread_has_all_numbers_of_a_spline() -> None:
    # In the layout of a product's results, sums over bins exchange data between four threads: 84 times in this kernel.
    code = """
from glf_fast.kernels.launch_table import Launch
from shipped import of_entry
from triton_resources import compiled
kernel = compiled(of_entry("forward-splines8 small tf32 few", Launch(16, 64, 32, True, 4, 3)), 90)
exchanges = kernel.asm["ptx"].count("shfl.sync")
assert exchanges < 30, exchanges
"""
    done = forked.compiler(code)
    assert done.returncode == 0, done.stderr


def test_the_named_flows_are_those_of_the_benchmarks() -> None:
    assert {name: (c.dim, c.hidden, c.context_dim, c.batch, c.bins) for name, c in FLOWS.items()} == shipped.FLOWS
    c = MASKED["sbi-maf"]
    assert shipped.AUTOREGRESSIVE[c.name][0] == (c.dim, c.hidden, c.context_dim, c.batch, c.bins)


def test_a_spread_of_the_shipped_kernels_stays_within_its_bounds() -> None:
    gate = [sys.executable, TOOLS / "compile_gate.py", "--every", "89"]
    done = subprocess.run(gate, env=COMPILED, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"sm_{arch}" in done.stdout for arch in (80, 90, 100))
