"""Batched invertible linear layers: dense matrices by ours, torch.linalg and CuPy; layers applied to vectors and images."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from bench.check import operation, why_wrong
from bench.race import Clock, Job, Provider
from glf_fast import ops, reference

__all__ = ["APPLIED", "BACKENDS", "LINEAR", "PROVIDERS", "AppliedCase", "LinearCase", "appliers"]

# torch.linalg by the library under it; on a processor there is one.
BACKENDS = {"torch.linalg": "default", "torch.linalg, cusolver": "cusolver", "torch.linalg, magma": "magma"}


@dataclass(frozen=True)
class LinearCase:
    """K dense matrices (K, D, D), as near to the identity as those of a trained flow."""

    count: int
    dim: int

    @property
    def name(self) -> str:
        """linear-K-D."""
        return f"linear-{self.count}-{self.dim}"

    def inputs(self, device: str = "cpu") -> Tensor:
        """(K, D, D), which ask for gradients."""
        torch.manual_seed(0)
        noise = torch.randn(self.count, self.dim, self.dim, device=device)
        return (torch.eye(self.dim, device=device) + 0.5 * noise / self.dim**0.5).requires_grad_()

    @property
    def sizes(self) -> dict[str, Any]:
        """For results."""
        return {"batch": self.count, "dim": self.dim}

    def operations(self, mode: str) -> int:
        """LU 2/3 D³, inverse 4/3 D³ each; backward two products more."""
        return self.count * self.dim**3 * (2 if mode == "forward" else 6)

    def bytes(self, mode: str) -> int:
        """Matrices read, inverses written, in float32; backward their gradients read, the matrices' written."""
        return 4 * self.count * self.dim**2 * (2 if mode == "forward" else 4)


def _job(name: str, case: LinearCase, mode: str, clock: Clock) -> Job:
    """log|det| (K,) and inverse (K, D, D), or [∂W]."""
    W = case.inputs(clock.DEVICE)
    given = gradients(case, clock.DEVICE)

    def call() -> list[Tensor]:
        if mode == "train":
            return list(torch.autograd.grad(_slogdet_inverse(name, W), W, given))
        with torch.no_grad():
            return _slogdet_inverse(name, W)

    def check(found: list[Tensor]) -> str:
        return why_wrong(found, exact_linear(case, mode, clock.DEVICE))

    return Job(call, check, alone=name == "glf_fast", again=lambda: _job(name, case, mode, clock))


def _slogdet_inverse(name: str, W: Tensor) -> list[Tensor]:
    if name == "glf_fast":
        return list(ops.slogdet_inverse(W)[1:3])
    if name == "CuPy":
        import cupy

        matrices = cupy.from_dlpack(W.detach())
        found = cupy.linalg.slogdet(matrices)[1], cupy.linalg.inv(matrices)
        return [torch.from_dlpack(t) for t in found]
    if W.is_cuda:
        torch.backends.cuda.preferred_linalg_library(BACKENDS[name])
    # inv_ex, because inv waits for the GPU to look for singular matrices.
    return [torch.linalg.slogdet(W)[1], torch.linalg.inv_ex(W)[0]]


@lru_cache(maxsize=1)
def exact_linear(case: LinearCase, mode: str, device: str) -> list[Tensor]:
    """The exact results of a pass, in float64: once for all providers of a case."""
    exact = case.inputs(device).detach().double().requires_grad_()
    truth = list(reference.slogdet_inverse(exact)[1:3])
    if mode == "train":
        truth = list(torch.autograd.grad(truth, exact, [g.double() for g in gradients(case, device)]))
    return [t.detach() for t in truth]


def gradients(case: LinearCase, device: str) -> list[Tensor]:
    """Gradients for log|det| (K,) and inverse (K, D, D)."""
    torch.manual_seed(1)
    return [torch.randn(case.count, device=device), torch.randn(case.count, case.dim, case.dim, device=device)]


def _no_cupy(case: LinearCase, mode: str, device: str) -> str:
    if device == "cpu" or importlib.util.find_spec("cupy") is None:
        return "CuPy needs a GPU" if device == "cpu" else "CuPy is not installed"
    return "CuPy has no gradients" if mode == "train" else ""


@dataclass(frozen=True)
class AppliedCase:
    """One layer applied to vectors (B, D) or images (B, D, H, W)."""

    shape: tuple[int, ...]
    order: str = "contiguous"  # or "channels-last"

    @property
    def name(self) -> str:
        """Shape and order."""
        return "x".join(map(str, self.shape)) + (f" {self.order}" if len(self.shape) > 2 else "")

    def inputs(self, device: str = "cpu") -> list[Tensor]:
        """x, A, c, log|det A|, which ask for gradients."""
        torch.manual_seed(0)
        dim = self.shape[1]
        x = torch.randn(self.shape, device=device)
        if self.order == "channels-last":
            x = x.to(memory_format=torch.channels_last)
        A = torch.eye(dim, device=device) + 0.5 * torch.randn(dim, dim, device=device) / dim**0.5
        return [t.requires_grad_() for t in (x, A, torch.randn(dim, device=device), torch.randn((), device=device))]

    @property
    def sizes(self) -> dict[str, Any]:
        """For results."""
        return {"batch": self.shape[0], "dim": self.shape[1]}

    def operations(self, mode: str) -> int:
        """The product; backward two more."""
        numbers = torch.Size(self.shape).numel()
        return 2 * numbers * self.shape[1] * (3 if mode == "train" else 1)

    def bytes(self, mode: str) -> int:
        """x read and y written; backward ∂y and x read, ∂x written."""
        return 4 * torch.Size(self.shape).numel() * (5 if mode == "train" else 2)


def _applied_job(function: Callable[..., Any], case: AppliedCase, mode: str, clock: Clock) -> Job:
    """y and logdet, or the gradients of x, A, c and log|det A|."""
    inputs = case.inputs(clock.DEVICE)
    gradients = [torch.randn_like(inputs[0]), torch.randn(case.shape[0], device=clock.DEVICE)]
    job = operation(function, reference.invertible_linear, inputs, gradients, mode)
    job.again = lambda: _applied_job(function, case, mode, clock)
    return job


def _conv2d(
    x: Tensor, matrix: Tensor, offset: Tensor, logabsdet: Tensor, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """As Glow's implementations have it."""
    kernel = matrix.mT[:, :, None, None]
    y = torch.conv2d(x - offset[:, None, None], kernel) if inverse else torch.conv2d(x, kernel, offset)
    pixels = x.shape[2:].numel()
    return y, ((-pixels if inverse else pixels) * logabsdet).expand(len(x))


PROVIDERS = {
    **{name: Provider(name, partial(_job, name)) for name in ("glf_fast", *BACKENDS)},
    "CuPy": Provider("CuPy", partial(_job, "CuPy"), _no_cupy),
}
VECTORS = {
    "glf_fast": Provider("glf_fast", partial(_applied_job, ops.invertible_linear)),
    "eager": Provider("eager", partial(_applied_job, reference.invertible_linear)),
}
IMAGES = VECTORS | {"conv2d": Provider("conv2d", partial(_applied_job, _conv2d))}


def appliers(case: AppliedCase) -> dict[str, Provider]:
    """Who can apply it."""
    return IMAGES if len(case.shape) > 2 else VECTORS


# On a processor what takes a tenth of a second or less: LU and inverse of 1,024 matrices of 64 × 64.
LINEAR = [
    LinearCase(count, dim)
    for count in (8, 32, 1024, 16384)
    for dim in (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192)
    if count * dim**3 <= 3e8
]
APPLIED = [
    *(AppliedCase(shape) for shape in ((256, 20), (256, 64), (4096, 64))),
    *(
        AppliedCase(shape, order)
        for shape in ((64, 12, 16, 16), (64, 24, 8, 8), (64, 48, 4, 4))
        for order in ("contiguous", "channels-last")
    ),
]
