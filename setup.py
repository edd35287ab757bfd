"""Builds the glf_fast distribution; metadata lives in pyproject.toml.

The processor kernels (csrc/cpu) are built when there are torch and a C++ compiler, the CUDA kernels (csrc/cuda) when there
are also nvcc and a torch with CUDA. Without them the installation succeeds as pure Python, and `python -m glf_fast.info`
says what is slower.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

# The LibTorch Stable ABI of torch 2.10: one binary serves that version and all later ones, on every Python.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
CXX = ["-O3", "-g0", "-std=c++17", "-Wall", "-Wextra", "-Wno-unused-parameter", TORCH_TARGET]
# Turing, Ampere, Hopper, Blackwell; each serves later chips of its generation, and PTX of the first all that come after.
ARCHITECTURES = ("75", "80", "90", "100")


def sources(*patterns: str) -> list[str]:
    """Files under csrc, sorted."""
    return sorted(str(path) for pattern in patterns for path in Path("csrc").glob(pattern))


def nvcc_flags(nvcc: Path) -> list[str]:
    """Code for every architecture of ours that this nvcc knows; nothing where there is none, or one that does not run."""
    if not nvcc.exists():
        return []
    try:
        listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"glf_fast: building without CUDA kernels: {error}", file=sys.stderr)
        return []
    known = [arch for arch in ARCHITECTURES if f"compute_{arch}" in listing]
    if not known:
        print(f"glf_fast: building without CUDA kernels: {nvcc} knows none of {ARCHITECTURES}", file=sys.stderr)
        return []
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in known]
    return ["-O3", "-std=c++17", *targets, f"-gencode=arch=compute_{known[0]},code=compute_{known[0]}"]


def kernels() -> dict[str, Any]:
    """Arguments of `setup` that build the extensions; none where torch cannot be imported."""
    try:
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension
    except ImportError as error:
        print(f"glf_fast: building without kernels ({error})", file=sys.stderr)
        return {}

    class Build(BuildExtension):
        """Builds the extensions, or says which is missing."""

        def run(self) -> None:
            wanted, before = list(self.extensions), dict(vars(self))
            # An nvcc that does not fit torch stops everything before anything is built: then once more without it.
            for extensions in [wanted, wanted[:1]][: len(wanted)]:
                vars(self).update(before, extensions=extensions)  # a run that fails leaves its compiler and folder set
                try:
                    return super().run()
                except Exception as error:  # no compiler, or an old one: every kind of error has been seen here
                    names = " and ".join(extension.name for extension in extensions)
                    print(f"glf_fast: {names} not built, the flows will be slow: {error}", file=sys.stderr)
            self.extensions = []

    headers = sources("**/*.h", "**/*.cuh")
    cpu = CppExtension(
        "glf_fast._cpu",
        sources("bindings.cpp", "bindings_linear.cpp", "cpu/*.cpp"),
        include_dirs=["csrc"],
        depends=headers,
        extra_compile_args=CXX,
        py_limited_api=True,
    )
    extensions = [cpu]
    nvcc = Path(CUDA_HOME or "") / "bin" / "nvcc"
    if CUDA_HOME and (flags := nvcc_flags(nvcc)):
        # cudart is linked statically: the library does not depend on where torch keeps its own. The current stream comes
        # from torch_cuda, which torch loads without making its symbols known to others.
        extensions.append(
            CppExtension(
                "glf_fast._cuda",
                sources("bindings_cuda.cpp", "cuda/*.cu"),
                include_dirs=["csrc", str(nvcc.parents[1] / "include")],
                library_dirs=[str(nvcc.parents[1] / "lib64")],
                libraries=["torch_cuda", "cudart_static", "rt", "dl", "pthread"],
                depends=headers,
                extra_compile_args={"cxx": [*CXX, "-DUSE_CUDA"], "nvcc": flags},
                py_limited_api=True,
            )
        )
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(
    packages=[
        *find_packages(include=["glf_fast", "glf_fast.*"]),
        "glf_fast.presets",
        "glf_fast.kernels",
        "glf_fast.cuda",
    ],
    package_dir={"glf_fast": "glf_fast", "glf_fast.kernels": "kernels", "glf_fast.cuda": "csrc/cuda"},
    package_data={
        "glf_fast": ["py.typed", "presets/*.toml", "metrics/*.safetensors", "training/*.html"],
        "glf_fast.kernels": ["launch_table.json"],
        "glf_fast.cuda": ["*.cuh"],  # what CuPy compiles where there was no nvcc
    },
    **kernels(),
)
