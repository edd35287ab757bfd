"""The CUDA code without a GPU: run on the host under sanitizers, compiled for four generations, linked as a library."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
needs_nvcc = pytest.mark.skipif(not Path(NVCC).exists(), reason="needs CUDA's compiler, nvcc")

# Registers a thread, some 5 % above the most that nvcc 13.0 gives on any of the four: a lane's rows or a thread's tile, and
# what it takes to move them. float64 in 8 × 8 tiles has 184 on sm_80 and sm_100, and 255 on sm_90 with 4 bytes spilled.
REGISTERS = {
    "warp 4 f": 40, "warp 8 f": 48, "warp 16 f": 56, "warp 24 f": 64, "warp 32 f": 72, "warp 48 f": 144, "warp 64 f": 176,
    "warp 4 d": 48, "warp 8 d": 64, "warp 16 d": 80, "warp 24 d": 104, "warp 32 d": 136,
    "tile 6 f": 112, "tile 8 f": 120, "tile 12 f": 224, "tile 4 d": 88, "tile 6 d": 176, "tile 8 d": 255,
}  # fmt: skip
SPILLED_BYTES = 16


@pytest.mark.parametrize("name", ["device", "matrix_units"])
def test_the_device_code_is_right_on_the_host(name: str, tmp_path: Path) -> None:
    """In either order of threads, which a barrier that is missing would tell apart."""
    compiler = shutil.which("c++")
    assert compiler, "a C++ compiler is needed"
    program = str(tmp_path / name)
    # Compilation takes longer than the program: little optimization. Warnings that need more are those of host_kernels.cpp.
    flags = ["-std=c++17", "-Og", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{ROOT / 'csrc'}"]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    source = str(Path(__file__).with_name(f"{name}.cpp"))
    subprocess.run([compiler, *flags, *sanitizers, source, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "all agree"), done.stdout + done.stderr


def compiled(architecture: int, target: Path) -> Path:
    """The kernels as setup.py compiles them, if they keep their rows in registers."""
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = [NVCC, "-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-Xptxas", "-v", code]
    source = ROOT / "csrc" / "cuda" / "linear.cu"
    done = subprocess.run([*command, "-c", source, "-o", target], capture_output=True, text=True, check=True)
    assert "warning" not in done.stderr, done.stderr
    pattern = r"Compiling entry function '(\w+)'.*?(\d+) bytes stack.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    kernels = re.findall(pattern, done.stderr, flags=re.S)
    assert len(kernels) == 2 * 4 + len(REGISTERS)
    for name, stack, spilled, registers in kernels:
        sized = re.search(r"(warp|tile)_kernelILi(\d+)E([fd])", name)
        # Unsized: two blocks of 256 threads share a multiprocessor.
        limit = REGISTERS[f"{sized[1]} {sized[2]} {sized[3]}"] if sized else 128
        assert int(registers) <= limit, (name, registers)
        # A stack is where rows or tiles lie that an index has driven out of the registers.
        assert int(spilled) <= SPILLED_BYTES and int(stack) <= SPILLED_BYTES, (name, stack, spilled)
    return target


@needs_nvcc
@pytest.mark.long
@pytest.mark.parametrize("architecture", [75, 80, 100])
def test_kernels_keep_their_rows_in_registers(architecture: int, tmp_path: Path) -> None:
    compiled(architecture, tmp_path / "linear.o")


@needs_nvcc
def test_the_library_links_and_wants_nothing_strange(tmp_path: Path) -> None:
    """Kernels of sm_90 keep their rows in registers. Beyond torch's stable interface, C and C++ libraries alone are needed."""
    home = Path(subprocess.run(["readlink", "-f", NVCC], capture_output=True, text=True).stdout.strip()).parents[1]
    if not (home / "include" / "cuda_runtime.h").exists():  # nvcc found through a wrapper
        home = Path("/usr/local/cuda")
    bindings = [path.stem for path in sorted((ROOT / "csrc").glob("bindings_cuda*.cpp"))]
    objects = [str(compiled(90, tmp_path / "linear.o")), *(str(tmp_path / f"{name}.o") for name in bindings)]
    for path in sorted({*(ROOT / "csrc" / "cuda").glob("*.cu")} - {ROOT / "csrc" / "cuda" / "linear.cu"}):
        objects.append(str(tmp_path / f"{path.stem}.o"))
        # Unoptimized, and no machine code: for the linker it is the same.
        code = ["-G", "-gencode=arch=compute_90,code=compute_90"]
        subprocess.run([NVCC, "-std=c++17", *code, "-Xcompiler", "-fPIC", "-c", path, "-o", objects[-1]], check=True)
    includes = [f"-I{path}" for path in (ROOT / "csrc", home / "include", Path(torch.__file__).parent / "include")]
    flags = [
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unused-parameter",
        "-Wno-unknown-pragmas",
    ]
    target = ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    for name in bindings:
        source, made = str(ROOT / "csrc" / f"{name}.cpp"), str(tmp_path / f"{name}.o")
        subprocess.run(["c++", *flags, *target, *includes, "-c", source, "-o", made], check=True)
    library = str(tmp_path / "_cuda.so")
    torch_libraries = str(Path(torch.__file__).parent / "lib")
    link = [
        "c++",
        "-shared",
        *objects,
        f"-L{home / 'lib64'}",
        f"-L{torch_libraries}",
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
    ]
    subprocess.run([*link, "-lcudart_static", "-lrt", "-ldl", "-lpthread", "-o", library], check=True)
    listing = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    wanted = [line.split()[-1] for line in listing.stdout.splitlines() if line.split()[0] != "w"]
    strange = [
        name for name in wanted if not re.search(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_|^_ZN?K?St|^(aoti_)?torch_", name)
    ]
    assert not strange
    assert any(name.startswith("aoti_torch_get_current_cuda_stream") for name in wanted)
