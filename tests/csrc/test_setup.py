"""setup.py on machines unlike this one: an nvcc that is broken, foreign, a script, or missing where sources are packed."""

import runpy
import shutil
import subprocess
import tarfile
from pathlib import Path

import forked
import pytest

ROOT = Path(__file__).parents[2]
# As in a torch with CUDA, which says where nvcc is; one without hides it.
SETUP = """
import runpy, sys, warnings
warnings.simplefilter("ignore")
from torch.utils import cpp_extension
cpp_extension.CUDA_HOME = {home!r}
sys.argv = ["setup.py", *{arguments!r}]
runpy.run_path("setup.py", run_name="__main__")
"""


def setup(folder: Path, *arguments: str, home: str | None = None) -> subprocess.CompletedProcess[str]:
    """`python setup.py …` in a folder, with the CUDA toolkit at `home`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return forked.ended(forked.program, SETUP.format(home=home, arguments=arguments))


def sources(folder: Path) -> Path:
    """What setup.py needs, with kernels that compile in a second."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder)
    for name in ("glf_fast", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("bindings.cpp", "bindings_linear.cpp", "bindings_cuda.cpp", "cpu/kernels.cpp", "cuda/linear.cu"):
        path = folder / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"int {path.stem}() {{ return 0; }}\n")
    return folder


NVCC = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
needs_nvcc = pytest.mark.skipif(not Path(NVCC).exists(), reason="needs CUDA's compiler, nvcc")


def script(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{content}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def toolkit(monkeypatch):
    """setup.py's function, without its setup()."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    return runpy.run_path("setup.py")["toolkit"]


@needs_nvcc
def test_the_toolkit_behind_a_script_is_found_and_serves(toolkit, tmp_path: Path) -> None:
    nvcc = script(tmp_path / "bin" / "nvcc", f'exec {NVCC} "$@"')
    found = toolkit(nvcc, tmp_path / "no torch here")
    assert found == toolkit(Path(NVCC), tmp_path) and not found.home.is_relative_to(tmp_path)
    source, compiled, program = (tmp_path / f"program{suffix}" for suffix in (".cu", ".o", ""))
    source.write_text("#include <cuda_runtime.h>\nint main() { int n; cudaGetDeviceCount(&n); return 0; }\n")
    subprocess.run([found.home / "bin" / "nvcc", "-c", source, "-o", compiled], check=True)
    link = ["c++", compiled, f"-L{found.library}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
    subprocess.run([*link, "-o", program], check=True)
    assert (found.include / "cuda_runtime.h").is_file() and subprocess.run([program]).returncode == 0


@pytest.mark.parametrize("place", ["toolkit/targets/sbsa-linux/lib", "site-packages/nvidia/cu13/lib"])
def test_the_static_runtime_may_lie_in_a_target_or_with_torch(toolkit, place: str, tmp_path: Path) -> None:
    home = tmp_path / "toolkit"
    for path in (home / "bin" / "nvcc", home / "include" / "cuda_runtime.h", tmp_path / place / "libcudart_static.a"):
        script(path, "")
    nvcc = script(tmp_path / "bin" / "nvcc", f"echo '#$ TOP={home}/bin/..' >&2")
    packages = tmp_path / "site-packages"
    assert toolkit(nvcc, packages) == (home, home / "include", tmp_path / place)
    (tmp_path / place / "libcudart_static.a").unlink()
    with pytest.raises(LookupError, match=r"libcudart_static\.a is in none of .*toolkit/lib64, .*toolkit/lib"):
        toolkit(nvcc, packages)


@pytest.mark.parametrize(
    ("nvcc", "said"),
    [
        ("exit 1", "NOT BUILT: glf_fast._cuda, what it serves will be slow: Command"),
        ("echo compute_20", "knows none of"),
        ("[ $1 != --list-gpu-arch ] || echo compute_80", "does not say where its toolkit is"),
        # One that has all, and is of no CUDA that this torch takes.
        (
            "case $1 in --list*) echo compute_80;; --dry*) echo '#$ TOP=HOME' >&2;; *) exit 1;; esac",
            "NOT BUILT: glf_fast._cuda",
        ),
    ],
)
def test_the_processors_kernels_are_built_whatever_nvcc_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nvcc: str, said: str
) -> None:
    home = tmp_path / "cuda"
    compiler = script(home / "bin" / "nvcc", nvcc.replace("HOME", str(home)))
    for path in (home / "include" / "cuda_runtime.h", home / "lib64" / "libcudart_static.a"):
        script(path, "")
    folder = tmp_path / "sources"
    folder.mkdir()
    monkeypatch.setenv("MAX_JOBS", "1")
    done = setup(sources(folder), "-q", "build_ext", "--inplace", home=str(compiler.parents[1]))
    assert done.returncode == 0 and said in done.stderr, done.stdout + done.stderr
    assert "NOT BUILT: glf_fast._cpu" not in done.stderr
    assert [path.name for path in (folder / "glf_fast").glob("*.so")] == ["_cpu.abi3.so"]


def test_without_a_compiler_nothing_is_built_and_nothing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")
    monkeypatch.setenv("CXX", "false")
    done = setup(sources(tmp_path), "-q", "build_ext", "--inplace")
    assert done.returncode == 0 and "NOT BUILT: glf_fast._cpu, what it serves will be slow" in done.stderr, done.stderr
    assert not list((tmp_path / "glf_fast").glob("*.so"))


def test_a_source_distribution_has_all_sources(tmp_path: Path) -> None:
    """Also those of kernels that the machine which packs them cannot compile."""
    folder = tmp_path / "sources"
    folder.mkdir()
    sources(folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc", dirs_exist_ok=True)
    done = setup(folder, "-q", "sdist", "--dist-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    wanted = {str(path.relative_to(folder)) for path in (folder / "csrc").rglob("*") if path.is_file()}
    assert {"csrc/cuda/linear.cu", "csrc/bindings_cuda.cpp"} < wanted <= names
