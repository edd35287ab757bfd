"""Tests on a GPU: `pytest tests/gpu -m gpu --confcutdir=tests/gpu`, which needs nothing but torch, Triton and pytest.

GLF_FAST_REHEARSE=1 runs the same bodies on a processor, with smaller batches, in Triton's interpreter.
"""

import os
from collections.abc import Iterator

if os.environ.get("GLF_FAST_REHEARSE") == "1":  # before anything imports triton
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

from glf_fast import use_backend

REHEARSE = os.environ.get("GLF_FAST_REHEARSE") == "1"


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The GPU, with the kernels that every user gets there; a processor and its interpreter in a rehearsal."""
    if not REHEARSE and not torch.cuda.is_available():
        pytest.fail("there is no GPU: GLF_FAST_REHEARSE=1 runs these tests in Triton's interpreter")
    precision = torch.get_float32_matmul_precision()
    with use_backend("triton" if REHEARSE else "auto"):
        yield torch.device("cpu" if REHEARSE else "cuda")
    torch.set_float32_matmul_precision(precision)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """What a kernel leaves unwritten in its results is NaN."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS would ask for an environment variable
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill
