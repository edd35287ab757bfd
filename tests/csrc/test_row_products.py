"""Weight gradients' device code without a GPU: run on the host under sanitizers, compiled for four generations."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import triton

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
needs_nvcc = pytest.mark.skipif(not Path(NVCC).exists(), reason="needs CUDA's compiler, nvcc")

# Two blocks of 256 threads share a multiprocessor where a thread has 128 registers. nvcc 13.0 takes 123 on sm_90; on sm_80 and
# sm_100 it spills 4 and 8 bytes.
REGISTERS = 128
SPILLED_BYTES = {75: 0, 80: 16, 90: 0, 100: 16}
# Matrix instructions of a loop: 2 × 4 tiles of the results, three products each for full precision; and most instructions of
# the innermost loop in full precision, 8 rows of a warp's 32 × 32 entries: some 5 % above nvcc 13.0's 121 for sm_90.
MATRIX_INSTRUCTIONS = {"three tf32 products": 24, "tf32": 8, "bf16": 8}
INNERMOST = 128


@pytest.mark.parametrize(
    ("sanitizers", "whats"),
    [("address,undefined", ["shapes", "errors"]), ("thread", ["threads"])],
    ids=["every shape, and errors of units that truncate", "a thread for each warp"],
)
def test_sums_over_rows_on_the_host(sanitizers: str, whats: list[str], tmp_path: Path) -> None:
    """In either order of threads, with copies that come early or late; see row_products.cpp."""
    compiler = shutil.which("c++")
    assert compiler, "a C++ compiler is needed"
    program = str(tmp_path / "row_products")
    # Compilation takes longer than the program: little optimization. Warnings that need more are those of host_kernels.cpp.
    flags = ["-std=c++17", "-Og", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-pthread"]
    sources = [
        f"-I{ROOT / 'csrc'}",
        f"-fsanitize={sanitizers}",
        "-fno-sanitize-recover=all",
        str(Path(__file__).with_name("row_products.cpp")),
    ]
    subprocess.run([compiler, *flags, *sources, "-o", program], check=True)
    for what in whats:
        done = subprocess.run([program, what], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.endswith("all agree\n"), done.stdout + done.stderr


def compiled(architecture: int, target: Path) -> None:
    """The kernels as setup.py compiles them, if they stay in their registers."""
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    source = ROOT / "csrc" / "cuda" / "row_products.cu"
    command = [NVCC, "-std=c++17", "-O3", "-Xptxas", "-v", code, "-cubin", source, "-o", target]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "warning" not in done.stderr, done.stderr
    pattern = r"Compiling entry function '(\w+)'.*?(\d+) bytes stack.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    kernels = re.findall(pattern, done.stderr, flags=re.S)
    assert len(kernels) == 2
    for name, stack, spilled, registers in kernels:
        assert int(registers) <= REGISTERS, (name, registers)
        limit = SPILLED_BYTES[architecture]
        assert int(spilled) <= limit and int(stack) <= limit, (name, stack, spilled)


def loops(cubin: Path) -> list[list[str]]:
    """Names of the instructions of each loop of row_products_kernel that multiplies, in the order of their ends."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    said = subprocess.run([tool, "-sass", cubin], check=True, capture_output=True, text=True).stdout
    body = re.search(r"Function : \w*row_products_kernel\w*\n(.*?)(?=Function : |\Z)", said, flags=re.S)[1]
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?);", body, flags=re.M)
    found = []
    for at, name, arguments in lines:
        target = re.search(r"0x([0-9a-f]+)", arguments) if name == "BRA" else None
        if target and int(target[1], 16) < int(at, 16):
            loop = [op for place, op, _ in lines if int(target[1], 16) <= int(place, 16) <= int(at, 16)]
            found += [loop] if any(op.startswith("HMMA") for op in loop) else []
    return found


@needs_nvcc
def test_a_stage_of_rows_takes_few_instructions(tmp_path: Path) -> None:
    cubin = tmp_path / "row_products.cubin"
    compiled(90, cubin)
    # In full precision and tf32 a loop over a stage's rows within the one over stages; in bf16 a stage is 16 rows a warp, once.
    found = loops(cubin)
    kinds = {"HMMA.1688.F32.TF32": "tf32", "HMMA.16816.F32.BF16": "bf16"}
    counted = [(kinds[op], loop.count(op)) for loop in found for op in kinds if op in loop]
    three, one, bf16 = MATRIX_INSTRUCTIONS.values()
    assert sorted(counted) == sorted([("tf32", three)] * 2 + [("tf32", one)] * 2 + [("bf16", bf16)])
    for loop in found:
        assert not [op for op in loop if op.startswith(("LDL", "STL"))]
        copies = sum(op.startswith("LDGSTS") for op in loop)
        barriers = sum(op.startswith("BAR") for op in loop)
        # Copies of 4, 8 and 16 bytes to either factor's next stage; one barrier a stage; none of both within its rows.
        assert (copies > 0) == (barriers == 1) and barriers <= 1, (copies, barriers)
    innermost = min((loop for loop in found if sum(op.startswith("HMMA") for op in loop) == three), key=len)
    assert len(innermost) <= INNERMOST


@needs_nvcc
@pytest.mark.long
@pytest.mark.parametrize("architecture", [75, 80, 100])
def test_other_generations_stay_in_their_registers(architecture: int, tmp_path: Path) -> None:
    """Of sm_75 the code traps: nothing launches it there."""
    compiled(architecture, tmp_path / "row_products.cubin")
