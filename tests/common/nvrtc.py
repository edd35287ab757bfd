"""The CUDA kernels by NVRTC, as CuPy compiles them on a GPU, but for its driver."""

from collections.abc import Sequence

import pytest

from glf_fast.ops.linear.cupy import NVRTC_OPTIONS


def check_that_nvrtc_compiles(source: str, names: Sequence[str]) -> None:
    """Machine code for an H100 holds every kernel of these names, each under a name of its own, without a warning."""
    nvrtc = pytest.importorskip("cupy", reason="needs CuPy, which has no wheel for this machine").cuda.nvrtc
    program = nvrtc.createProgram(source, "kernels.cu", (), ())
    for name in names:
        nvrtc.addNameExpression(program, name)
    try:
        nvrtc.compileProgram(program, ("--gpu-architecture=sm_90", "-Werror=all-warnings", *NVRTC_OPTIONS))
    finally:
        log = nvrtc.getProgramLog(program)
    assert not log.strip(), log
    lowered = {nvrtc.getLoweredName(program, name) for name in names}
    cubin = nvrtc.getCUBIN(program)
    assert len(lowered) == len(names) and all(name.encode() in cubin for name in lowered)
