"""Builds the glf_fast distribution; metadata lives in pyproject.toml.

The processor kernels (csrc/cpu) are built when there are torch and a C++ compiler, the CUDA kernels (csrc/cuda) when there
are also nvcc and a torch with CUDA. Without them the installation succeeds as pure Python, and `python -m glf_fast.info`
says what is slower.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import find_packages, setup

# The LibTorch Stable ABI of torch 2.10: one binary serves that version and all later ones, on every Python.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
THREADS = [] if os.name == "nt" else ["-pthread"]
# Nobody reads errno, and square roots that set it are not vectorised.
FAST = ["-O3", "-g0", "-std=c++17", "-fno-math-errno"]
CXX = [*FAST, *THREADS, "-Wall", "-Wextra", "-Wno-unused-parameter", TORCH_TARGET]
# Turing, Ampere, Hopper, Blackwell; each serves later chips of its generation, and PTX of the last all that come after.
ARCHITECTURES = ("75", "80", "90", "100")


def sources(*patterns: str) -> list[str]:
    """Files under csrc, sorted."""
    return sorted(str(path) for pattern in patterns for path in Path("csrc").glob(pattern))


def nvcc_flags(nvcc: Path) -> list[str]:
    """Code for every architecture of ours that this nvcc knows, one thread for each.

    Raises:
        OSError, subprocess.CalledProcessError: it does not run. LookupError: it knows none of them.
    """
    listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    known = [arch for arch in ARCHITECTURES if f"compute_{arch}" in listing]
    if not known:
        raise LookupError(f"{nvcc} knows none of {ARCHITECTURES}")
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in known]
    return ["-O3", "-std=c++17", "--threads=0", *targets, f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}"]


class Toolkit(NamedTuple):
    """Folders of a CUDA toolkit: `home` has bin/nvcc, `include` cuda_runtime.h, `library` libcudart_static.a."""

    home: Path
    include: Path
    library: Path


def toolkit(nvcc: Path, torch_packages: Path) -> Toolkit:
    """The toolkit that an nvcc belongs to, by its own account: /usr/local/bin/nvcc may be a script that starts another.

    `torch_packages` is the folder where torch is installed, beside which its own CUDA libraries are.

    Raises:
        OSError, subprocess.CalledProcessError: nvcc does not run. LookupError: a part of the toolkit is missing.
    """
    command = [nvcc, "--dryrun", "-x", "cu", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", said, flags=re.MULTILINE)
    if not top:
        raise LookupError(f"{nvcc} --dryrun does not say where its toolkit is")
    home = Path(top[1].strip()).resolve()
    folders = [Path(found).resolve() for found in re.findall(r'"-[IL]([^"]+)"', said)]
    includes = [*folders, home / "include", *home.glob("targets/*/include")]
    own = torch_packages / "nvidia"  # cu13, or cuda_runtime in the wheels of CUDA 12
    libraries = [*folders, home / "lib64", home / "lib", *home.glob("targets/*/lib"), *own.glob("cu*/lib")]
    return Toolkit(
        _holder([home], "bin/nvcc"), _holder(includes, "cuda_runtime.h"), _holder(libraries, "libcudart_static.a")
    )


def _holder(folders: list[Path], name: str) -> Path:
    """The first folder that holds a file."""
    for folder in folders:
        if (folder / name).is_file():
            return folder
    raise LookupError(f"{name} is in none of {', '.join(dict.fromkeys(map(str, folders)))}")


def kernels() -> dict[str, Any]:
    """Arguments of `setup` that build the extensions; none where torch cannot be imported."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        print(f"glf_fast: NOT BUILT: glf_fast._cpu and glf_fast._cuda: {error}", file=sys.stderr)
        return {}
    missing: dict[str, str] = {}  # extension → why it is not built

    class Build(cpp_extension.BuildExtension):
        """Builds the extensions, and says at the end which are missing."""

        def run(self) -> None:
            wanted, before = list(self.extensions), dict(vars(self))
            # An nvcc that does not fit torch stops everything before anything is built: then once more without it.
            for extensions in [wanted, wanted[:1]][: len(wanted)]:
                vars(self).update(before, extensions=extensions)  # a run that fails leaves its compiler and folder set
                try:
                    super().run()
                    break
                except Exception as error:  # no compiler, or an old one: every kind of error has been seen here
                    missing[extensions[-1].name] = str(error)
            else:
                self.extensions = []
            for name, why in missing.items():
                print(f"\nglf_fast: NOT BUILT: {name}, what it serves will be slow: {why}\n", file=sys.stderr)

    headers = sources("**/*.h", "**/*.cuh")
    cpu = cpp_extension.CppExtension(
        "glf_fast._cpu",
        sources(
            "bindings.cpp",
            "bindings_linear.cpp",
            "bindings_fit.cpp",
            "bindings_autoregressive.cpp",
            "bindings_glow.cpp",
            "cpu/*.cpp",
        ),
        include_dirs=["csrc"],
        depends=headers,
        extra_compile_args=CXX,
        extra_link_args=THREADS,
        py_limited_api=True,
    )
    extensions = [cpu]
    if torch.version.cuda and not cpp_extension.CUDA_HOME:
        missing["glf_fast._cuda"] = "there is no nvcc on $PATH, in $CUDA_HOME or in /usr/local/cuda"
    if cpp_extension.CUDA_HOME:
        nvcc = Path(cpp_extension.CUDA_HOME) / "bin" / "nvcc"
        try:
            flags = nvcc_flags(nvcc)
            cuda = toolkit(nvcc, Path(torch.__file__).parents[1])
        except (OSError, subprocess.CalledProcessError, LookupError) as error:
            missing["glf_fast._cuda"] = str(error)
        else:
            cpp_extension.CUDA_HOME = str(cuda.home)  # torch would take the folder above the one where it found an nvcc
            # cudart is linked statically: the library does not depend on where torch keeps its own. The current stream comes
            # from torch_cuda, which torch loads without making its symbols known to others.
            extensions.append(
                cpp_extension.CppExtension(
                    "glf_fast._cuda",
                    sources("bindings_cuda*.cpp", "cuda/*.cu"),
                    include_dirs=["csrc", str(cuda.include)],
                    library_dirs=[str(cuda.library)],
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
        "glf_fast.presets.compare",
        "glf_fast.presets.compare.published",
        "glf_fast.presets.compare.sequences",
        "glf_fast.presets.compare.sequences.published",
        "glf_fast.presets.compare.sequences.shared",
        "glf_fast.presets.compare.shared",
        "glf_fast.kernels",
        "glf_fast.cuda",
    ],
    package_dir={"glf_fast": "glf_fast", "glf_fast.kernels": "kernels", "glf_fast.cuda": "csrc/cuda"},
    include_package_data=False,  # MANIFEST.in is for the source distribution
    package_data={
        "glf_fast": ["py.typed", "metrics/*.safetensors", "*.html", "training/*.html", "exploring/page.*"],
        "glf_fast.presets": [
            "*.toml",
            "compare/*.toml",
            "compare/order.txt",
            "compare/*/*.toml",
            "compare/sequences/order.txt",
            "compare/*/*/*.toml",
        ],
        "glf_fast.kernels": ["launch_table.json"],
        "glf_fast.cuda": ["*.cuh"],  # what CuPy compiles where there was no nvcc
    },
    **kernels(),
)
