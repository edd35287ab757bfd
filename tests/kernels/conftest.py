"""Kernel tests run in Triton's interpreter, with every uninitialised number NaN."""

from collections.abc import Iterator

import pytest
import torch

from glf_fast import backends, use_backend


@pytest.fixture
def interpreted() -> Iterator[None]:
    """On the Triton backend, interpreted, where what a kernel leaves unwritten in its results is NaN."""
    if "interpreted" not in backends()["triton"]:
        pytest.skip("a GPU is here, so kernels are compiled: `make gpu` tests them; TRITON_INTERPRET=1 interprets them")
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    with use_backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill
