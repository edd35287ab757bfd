"""Fixtures for all tests: real data and weights, fetched once into the cache by the package's own fetchers."""

import ctypes
import fcntl
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import interpreter
import pytest
import torch

# Triton's kernels run in its interpreter where there is no GPU. It reads this once, when kernels are defined, so it is set
# before anything imports glf_fast or triton: a test that compiles, in whichever worker, may do so at any time.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton"):
        interpreter.quicken()
os.environ["GLF_FAST_POISON"] = "1"  # what the processor's kernels leave unwritten is NaN; read at their first call

from glf_fast.data import weights
from glf_fast.data.idx import FASHION_MNIST
from glf_fast.files import cache_dir


@contextmanager
def one_worker_at_a_time(folder: Path) -> Iterator[None]:
    """Several test workers share one folder: the first one makes what the others find."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """once(name, make): the path of that name after make(path), which one of all test workers has called."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made(name: str, make: Callable[[Path], object]) -> Path:
        with one_worker_at_a_time(shared / f"once-{name}"):
            path, done = (shared / f"once-{name}" / part for part in (name, "done"))
            if not done.exists():
                make(path)
                done.touch()
        return path

    return made


def for_the_host(name: str, once: Callable[[str, Callable[[Path], object]], Path]) -> ctypes.CDLL:
    """A library of tests/csrc."""
    compiler = shutil.which("c++")
    assert compiler, "a C++ compiler is needed"
    root = Path(__file__).parents[1]
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-shared", "-pthread"]
    command = [compiler, *flags, f"-I{root / 'csrc'}", root / "tests" / "csrc" / f"{name}.cpp", "-o"]
    return ctypes.CDLL(str(once(f"{name}.so", lambda target: subprocess.run([*command, target], check=True))))


@pytest.fixture(scope="session")
def host_kernels(once: Callable[[str, Callable[[Path], object]], Path]) -> ctypes.CDLL:
    """The CUDA kernels of linear layers and sums over rows compiled for the host, launched by name (host_launches.py)."""
    return for_the_host("host_kernels", once)


@pytest.fixture(scope="session")
def host_flow(once: Callable[[str, Callable[[Path], object]], Path]) -> ctypes.CDLL:
    """The kernels of small flows."""
    return for_the_host("host_flow", once)


@pytest.fixture(scope="session")
def fashion_mnist_dir() -> Path:
    """Folder with the verified files of Fashion-MNIST."""
    with one_worker_at_a_time(cache_dir()):
        return FASHION_MNIST.find()


@pytest.fixture(scope="session")
def vgg16_weights() -> Path:
    """Verified VGG16 weights as safetensors."""
    with one_worker_at_a_time(cache_dir()):
        return weights.fetch("vgg16")
