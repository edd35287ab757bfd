"""Builds the glf_fast distribution; metadata lives in pyproject.toml.

The processor kernels (csrc/) are built when there are torch and a C++ compiler; without them the installation succeeds
as pure Python, and `python -m glf_fast.info` says what is slower.
"""

import sys
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

# The LibTorch Stable ABI of torch 2.10: one binary serves that version and all later ones, on every Python.
TORCH_TARGET = "0x020a000000000000"


def kernels() -> dict[str, Any]:
    """Arguments of `setup` that build the extension; none where torch cannot be imported."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        print(f"glf_fast: building without kernels ({error})", file=sys.stderr)
        return {}

    class Build(BuildExtension):
        """Builds the extension, or says why it is missing."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # no compiler, or one that is too old: every kind of error has been seen here
                print(f"glf_fast: the kernels were not built, the flows will be slow: {error}", file=sys.stderr)
                self.extensions = []

    extension = CppExtension(
        "glf_fast._cpu",
        sorted(map(str, [*Path("csrc").glob("bindings*.cpp"), *Path("csrc/cpu").glob("*.cpp")])),
        include_dirs=["csrc"],
        depends=sorted(map(str, Path("csrc").rglob("*.h"))),
        extra_compile_args=[
            "-O3",
            "-g0",
            "-std=c++17",
            "-Wall",
            "-Wextra",
            "-Wno-unused-parameter",
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
        ],
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(
    packages=[*find_packages(include=["glf_fast", "glf_fast.*"]), "glf_fast.presets"],
    package_data={"glf_fast": ["py.typed", "presets/*.toml", "metrics/*.safetensors", "*.html"]},
    **kernels(),
)
