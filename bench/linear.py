"""Batched invertible linear layers: dense matrices by ours, torch.linalg and CuPy; layers applied to vectors and images."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bench.check import why_wrong
from glf_fast import ops, reference

__all__ = [
    "APPLIED",
    "BACKENDS",
    "LINEAR",
    "Applied",
    "AppliedCase",
    "Linear",
    "LinearCase",
    "applied_names",
    "why_missing",
]

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

    def operations(self, mode: str) -> int:
        """LU 2/3 D³, inverse 4/3 D³ each; backward two products more."""
        return self.count * self.dim**3 * (2 if mode == "forward" else 6)

    def bytes(self, mode: str) -> int:
        """Matrices read, inverses written, in float32; backward their gradients read, the matrices' written."""
        return 4 * self.count * self.dim**2 * (2 if mode == "forward" else 4)


class Linear:
    """One provider's passes over one case's matrices: signs, log|det| and inverses, and their backward."""

    def __init__(self, name: str, case: LinearCase, device: str = "cpu") -> None:
        self.name, self.case, self.W = name, case, case.inputs(device)
        self.gradients = gradients(case, device)

    def run(self, mode: str) -> list[Tensor]:
        """[log|det| (K,), inverse (K, D, D)], or [∂W]."""
        if mode == "train":
            return list(torch.autograd.grad(self._slogdet_inverse(self.W), self.W, self.gradients))
        with torch.no_grad():
            return self._slogdet_inverse(self.W)

    def _slogdet_inverse(self, W: Tensor) -> list[Tensor]:
        if self.name == "glf_fast":
            return list(ops.slogdet_inverse(W)[1:3])
        if self.name == "CuPy":
            import cupy

            matrices = cupy.from_dlpack(W.detach())
            found = cupy.linalg.slogdet(matrices)[1], cupy.linalg.inv(matrices)
            return [torch.from_dlpack(t) for t in found]
        if W.is_cuda:
            torch.backends.cuda.preferred_linalg_library(BACKENDS[self.name])
        # inv_ex, because inv waits for the GPU to look for singular matrices.
        return [torch.linalg.slogdet(W)[1], torch.linalg.inv_ex(W)[0]]

    def why_wrong(self, mode: str) -> str:
        """What is wrong with its results, or ""."""
        return why_wrong(self.run(mode), exact_linear(self.case, mode, str(self.W.device)))


@lru_cache(maxsize=1)
def exact_linear(case: LinearCase, mode: str, device: str) -> list[Tensor]:
    """What `Linear.run` should give, in float64: once for all providers of a case."""
    exact = case.inputs(device).detach().double().requires_grad_()
    truth = list(reference.slogdet_inverse(exact)[1:3])
    if mode == "train":
        truth = list(torch.autograd.grad(truth, exact, [g.double() for g in gradients(case, device)]))
    return [t.detach() for t in truth]


def gradients(case: LinearCase, device: str) -> list[Tensor]:
    """Of log|det| (K,) and inverse (K, D, D)."""
    torch.manual_seed(1)
    return [torch.randn(case.count, device=device), torch.randn(case.count, case.dim, case.dim, device=device)]


def why_missing(name: str, device: str, mode: str) -> str:
    """Why a provider cannot be measured, or ""."""
    if name != "CuPy":
        return ""
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

    def operations(self, mode: str) -> int:
        """The product; backward two more."""
        numbers = torch.Size(self.shape).numel()
        return 2 * numbers * self.shape[1] * (3 if mode == "train" else 1)

    def bytes(self, mode: str) -> int:
        """x read and y written; backward ∂y and x read, ∂x written."""
        return 4 * torch.Size(self.shape).numel() * (5 if mode == "train" else 2)


def applied_names(case: AppliedCase) -> tuple[str, ...]:
    """Who can apply it."""
    return ("glf_fast", "eager", *(("conv2d",) if len(case.shape) > 2 else ()))


class Applied:
    """One provider's passes: y and logdet, or the gradients of x, A, c and log|det A|."""

    def __init__(self, name: str, case: AppliedCase, device: str = "cpu") -> None:
        functions: dict[str, Callable[..., Any]] = {
            "glf_fast": ops.invertible_linear,
            "eager": reference.invertible_linear,
            "conv2d": _conv2d,
        }
        self.function, self.inputs = functions[name], case.inputs(device)
        self.gradients = [torch.randn_like(self.inputs[0]), torch.randn(case.shape[0], device=device)]

    def run(self, mode: str) -> list[Tensor]:
        """One pass."""
        if mode == "train":
            return list(torch.autograd.grad(self.function(*self.inputs), self.inputs, self.gradients))
        with torch.no_grad():
            return list(self.function(*self.inputs, inverse=mode == "inverse"))

    def why_wrong(self, mode: str) -> str:
        """What is wrong with its results, or ""."""
        exact = [t.detach().double().requires_grad_() for t in self.inputs]
        truth = list(reference.invertible_linear(*exact, inverse=mode == "inverse"))
        if mode == "train":
            truth = list(torch.autograd.grad(truth, exact, [g.double() for g in self.gradients]))
        return why_wrong(self.run(mode), [t.detach() for t in truth])


def _conv2d(
    x: Tensor, matrix: Tensor, offset: Tensor, logabsdet: Tensor, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """As Glow's implementations have it."""
    kernel = matrix.mT[:, :, None, None]
    y = torch.conv2d(x - offset[:, None, None], kernel) if inverse else torch.conv2d(x, kernel, offset)
    pixels = x.shape[2:].numel()
    return y, ((-pixels if inverse else pixels) * logabsdet).expand(len(x))


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
