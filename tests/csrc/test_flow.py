"""The kernels of small and medium flows: on the host under sanitizers, compiled for GPUs, their instructions counted."""

import re
import shutil
import subprocess
from pathlib import Path

import medium_flow_costs
import pytest
import torch
from small_flow_costs import PRECISIONS, compiled, disassembled, microseconds, steps, tritons

from glf_fast.ops.coupling_flow import cluster
from glf_fast.ops.coupling_flow.cuda import MAX_ROWS
from glf_fast.ops.coupling_flow.small import FlowShape

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "csrc" / "cuda" / "flow.cu"
CLUSTERS = ROOT / "csrc" / "cuda" / "cluster_flow.cu"
NVCC = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
needs_nvcc = pytest.mark.skipif(not Path(NVCC).exists(), reason="needs CUDA's compiler, nvcc")

# Instructions of a step with relu and tanh log-scales, two hidden layers, no context, at most: some 5 % above nvcc 13.0's for
# sm_90. Forward, one that keeps what the backward needs, backward; then matrix instructions of each.
INSTRUCTIONS = {
    "float32": ((1870, 2340, 2730), 384),
    "tf32": ((1050, 1520, 1880), 128),
    "bf16": ((910, 1400, 1780), 104),
}
# Registers a thread, at most: 198, 250 and 48 on sm_90, and up to 222 in a forward on sm_100. 255 are all that there are.
REGISTERS = {"forward": 250, "gradient": 255, "pack": 64}
# Instructions of a warp in a step of glf-cifar by clusters: a forward that keeps what the backward needs, and a backward. Then
# their matrix instructions.
CLUSTER_INSTRUCTIONS = {
    "float32": ((3880, 2950), (132, 96)),
    "tf32": ((3010, 2570), (44, 36)),
    "bf16": ((2920, 2590), (42, 42)),
}


@pytest.mark.long  # compiling takes half a minute
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
@pytest.mark.parametrize("program", ["flow", "cluster_flow"])
def test_the_kernels_are_clean_under_sanitizers(program: str, sanitizers: str, tmp_path: Path) -> None:
    """In either order of lanes. The warps of a block, and of a cluster, are threads.

    A slot that is filled before all have read it is a race, and so is a tile that another block writes too early.
    """
    compiler = shutil.which("c++")
    assert compiler, "a C++ compiler is needed"
    target = tmp_path / program
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-pthread"]
    sources = [
        f"-I{ROOT / 'csrc'}",
        f"-fsanitize={sanitizers}",
        "-fno-sanitize-recover=all",
        str(Path(__file__).with_name(f"{program}.cpp")),
    ]
    subprocess.run([compiler, *flags, *sources, "-o", target], check=True)
    done = subprocess.run([target], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "all agree"), done.stdout + done.stderr


@needs_nvcc
@pytest.mark.parametrize(
    "precision", ["tf32", *(pytest.param(p, marks=pytest.mark.long) for p in PRECISIONS if p != "tf32")]
)
def test_a_step_takes_few_instructions_and_no_barrier(precision: str, tmp_path: Path) -> None:
    forward, gradient = compiled(precision, 90, tmp_path)
    found = steps(forward, gradient)
    most, products = INSTRUCTIONS[precision]
    for (name, step), limit in zip(found.items(), most, strict=True):
        assert step.instructions <= limit, (name, step)
        assert step.products == products, (name, step)
    for code in (forward, gradient):
        assert code.count("UBLKCP") >= 1, "weights come by bulk copies"
        assert code.count("BAR") == 1, "one barrier a block, before the first step"
        assert not any(loop.count("BAR", "MEMBAR") for loop in code.loops())
    # Why they are chosen where they are. For few rows even the longest predicted times are shorter than those of Triton's
    # kernels; for the most rows the shortest ones are.
    for rows, end in ((256, 1), (MAX_ROWS, 0)):
        times = microseconds(found, 8, rows)
        for name, theirs in tritons(precision, 8, rows).items():
            assert 5 < times[name][0] < times[name][1] < 90
            assert times[name][end] < theirs, (name, rows)


@needs_nvcc
@pytest.mark.long  # half a minute each
@pytest.mark.parametrize("precision", PRECISIONS)
def test_clusters_are_chosen_where_they_are_predicted_to_be_faster(precision: str, tmp_path: Path) -> None:
    codes = compiled(precision, 90, tmp_path, "cluster_path")
    most, products = CLUSTER_INSTRUCTIONS[precision]
    maps, mlp = PRECISIONS[precision]
    shape = FlowShape(8, 64, 0, (256, 256), maps, mlp, blocks=8)
    loops = medium_flow_costs.loops_of(codes[1])
    for i, transposed in enumerate((False, True)):
        step = medium_flow_costs.step(shape, loops[i], transposed, precision)
        assert step.instructions <= most[i] and step.products == products[i], step
    for dim in (32, 64, 128):
        for width in cluster.MOST_ROWS:
            s = shape._replace(dim=dim, hidden=(width, width))
            for gradients, name in enumerate(("log_prob", "gradients")):
                if rows := cluster.most_rows(s, bool(gradients)):
                    longest = medium_flow_costs.microseconds(s, rows, precision, codes)[name][1]
                    assert longest < medium_flow_costs.tritons(s, rows, precision)[name], (dim, width, name, rows)


@needs_nvcc
@pytest.mark.long  # two minutes each
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("architecture", [90, 100])
def test_clusters_keep_their_rows_in_registers(architecture: int, tmp_path: Path) -> None:
    target, kernels = resources(CLUSTERS, architecture, tmp_path)
    assert len(kernels) == 1 + 3 * 3
    for name, stack, spilled, registers in kernels:
        assert int(registers) <= 255 and int(stack) == int(spilled) == 0, (name, registers, stack, spilled)
    for kernel in disassembled(target):
        assert kernel.count("LDL", "STL") == 0, kernel.name
        if "pack" not in kernel.name:
            assert kernel.count("UBLKCP") and kernel.count("UCGABAR_ARV") and kernel.count("HMMA"), kernel.name


def test_clusters_fit_into_shared_memory() -> None:
    """Two units of weights fit at least: of the largest flow, and of the largest one of sixteen blocks."""
    for dim, context, hidden, blocks in ((128, 64, 512, 8), (64, 32, 512, 16)):
        s = FlowShape(1, dim, context, (hidden,) * 4, 0, 0, blocks=blocks)
        assert cluster.shared_bytes(s, 2) <= 227 << 10


@needs_nvcc
@pytest.mark.long  # a minute each
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_all_kernels_keep_their_rows_in_registers(architecture: int, tmp_path: Path) -> None:
    """And the bindings find the functions that launch them."""
    target, kernels = resources(SOURCE, architecture, tmp_path)
    assert len(kernels) == 1 + 2 * 3 * 3
    for name, stack, spilled, registers in kernels:
        assert int(registers) <= REGISTERS[name], (name, registers)
        assert int(stack) == int(spilled) == 0, (name, stack, spilled)
    machine_code = list(disassembled(target))
    assert len(machine_code) == len(kernels)
    for kernel in machine_code:
        assert kernel.count("LDL", "STL") == 0, kernel.name
        if "pack" not in kernel.name:
            assert kernel.count("UBLKCP" if architecture >= 90 else "LDGSTS") >= 1, kernel.name
            assert kernel.count("HMMA") == products(kernel.name), kernel.name
    bindings = compiled_bindings("-c", "-o", tmp_path / "bindings.o")
    wanted, defined = symbols(bindings, "--undefined-only"), symbols(target, "--defined-only")
    of_clusters = {name for name in wanted if re.search(r"3glf6device\d+cluster_(pack|forward|gradient)E", name)}
    assert len(wanted & defined) == len(of_clusters) == 3
    assert not any("3glf6device" in name for name in wanted - defined - of_clusters)


def resources(source: Path, architecture: int, folder: Path) -> tuple[Path, list[tuple[str, ...]]]:
    """The object file, and the kernels in it: name, bytes of stack and of spills, registers."""
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    target = folder / f"{source.stem}.o"
    command = [NVCC, "-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-Xptxas", "-v", code, "-c", source, "-o", target]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "warning" not in done.stderr, done.stderr
    entry = r"Compiling entry function '\w*(?:flow|cluster)_(\w+?)_kernel\w*'"
    pattern = entry + r".*?(\d+) bytes stack.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    return target, re.findall(pattern, done.stderr, flags=re.S)


def products(name: str) -> int:
    """The matrix instructions of a kernel: none is left out, or there twice. Loops over layers and context count once."""
    half, hidden, maps, mlp = map(int, re.findall(r"Li(\d+)E", name)[:4])
    # By precision: instructions for a product of 16 × 8 numbers, numbers that it sums, and tiles of the context at a time.
    instructions, depth, context = (3, 1, 1), (8, 8, 16), (1, 2, 4)

    def product(precision: int, inner: int, columns: int) -> int:
        return instructions[precision] * -(-8 * inner // depth[precision]) * columns

    both = product(maps, 2 * half, 2 * half) + product(mlp, hidden, hidden)
    forward = both + sum(product(mlp, *tiles) for tiles in ((half, hidden), (context[mlp], hidden), (hidden, 2 * half)))
    backward = both + sum(product(mlp, *tiles) for tiles in ((2 * half, hidden), (hidden, half), (hidden, 1)))
    return forward + (backward if "gradient" in name else 0)


def symbols(file: Path, which: str) -> set[str]:
    """The names that an object file wants, or defines."""
    said = subprocess.run(["nm", which, file], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1] for line in said.splitlines()}


def compiled_bindings(*how: str | Path) -> Path:
    """bindings_cuda_flow.cpp as setup.py compiles it, with warnings as errors; the last of `how` is returned."""
    home = Path(subprocess.run(["readlink", "-f", NVCC], capture_output=True, text=True).stdout.strip()).parents[1]
    home = home if (home / "include" / "cuda_runtime.h").exists() else Path("/usr/local/cuda")
    includes = [f"-I{path}" for path in (ROOT / "csrc", home / "include", Path(torch.__file__).parent / "include")]
    flags = ["-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-Wno-unknown-pragmas"]
    target = ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    subprocess.run(["c++", *flags, *target, *includes, ROOT / "csrc" / "bindings_cuda_flow.cpp", *how], check=True)
    return Path(how[-1])


@needs_nvcc
@pytest.mark.long
def test_gpus_before_tf32_compile_to_nothing_that_is_launched(tmp_path: Path) -> None:
    """setup.py compiles for sm_75, too, whose calls `refuses` leaves to others."""
    code = "-gencode=arch=compute_75,code=sm_75"
    for source in (SOURCE, CLUSTERS):
        subprocess.run([NVCC, "-std=c++17", "-O3", code, "-cubin", source, "-o", tmp_path / "flow.cubin"], check=True)
