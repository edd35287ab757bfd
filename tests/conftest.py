"""Fixtures for all tests: real data and weights, fetched once into the cache by the package's own fetchers."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

# Triton's kernels run in its interpreter where there is no GPU. It reads this once, when kernels are defined, so it is set
# before anything imports glf_fast or triton: a test that compiles, in whichever worker, may do so at any time.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["GLF_FAST_POISON"] = "1"  # what the processor's kernels leave unwritten is NaN; read at their first call

from glf_fast.data import weights
from glf_fast.data.idx import FASHION_MNIST
from glf_fast.files import cache_dir


@contextmanager
def one_worker_at_a_time() -> Iterator[None]:
    """Several test workers share one cache: the first one fetches, the others find."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    with (cache_dir() / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def fashion_mnist_dir() -> Path:
    """Folder with the verified files of Fashion-MNIST."""
    with one_worker_at_a_time():
        return FASHION_MNIST.find()


@pytest.fixture(scope="session")
def vgg16_weights() -> Path:
    """Verified VGG16 weights as safetensors."""
    with one_worker_at_a_time():
        return weights.fetch("vgg16")
