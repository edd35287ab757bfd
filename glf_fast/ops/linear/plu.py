"""PLU layers by the compiled kernels: what they take, and both passes as one differentiable function.

The operations have one name on all devices: torch runs what csrc/cpu or csrc/cuda holds for the tensors' own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glf_fast import reference
from glf_fast.ops.backends import CPP, CUDA, exporting_onnx, usable
from glf_fast.ops.checks import check_device, check_shape, check_tensors
from glf_fast.ops.differentiate import differentiate, plain_gradients_wanted
from glf_fast.ops.linear import schemas  # noqa: F401 — which defines the operations
from glf_fast.reference import Plu

__all__ = ["BACKENDS", "MAX_CUDA_DIM", "assemble", "check", "gradients", "refuses", "run"]

BACKENDS = (CPP, CUDA)
MAX_CUDA_DIM = 192  # one block a matrix; larger ones are for torch.linalg, which gives a matrix to the whole GPU
operations = torch.ops.glf_fast


def check(plu: Plu) -> None:
    """Raise ValueError or TypeError unless shapes, devices and indices of these arguments of `plu_assemble` fit."""
    permutation, lower, upper, *given = plu
    try:
        device = lower.device
        alike = all(t.device == device for t in plu[:5]) and all(t is None or t.device == device for t in plu[5:])
    except AttributeError:
        check_tensors(**{name: t for name, t in plu._asdict().items() if t is not None or name in Plu._fields[:5]})
        raise
    if not alike:
        check_device(zip(Plu._fields, plu, strict=True), device)
    if permutation.dtype != torch.int64:
        raise TypeError(f"permutation must be int64; got {permutation.dtype} (convert it with .long())")
    vectors = permutation.shape
    matrices = (*vectors, vectors[-1])
    if lower.shape != matrices or upper.shape != matrices:
        check_shape("lower", lower, matrices, "(…, D, D)")
        check_shape("upper", upper, matrices, "(…, D, D)")
    for name, vector in zip(Plu._fields[3:], given, strict=True):
        if vector is not None and vector.shape != vectors:
            check_shape(name, vector, vectors, "(…, D)")
    if (plu.log_scale is None) != (plu.bias is None):
        raise ValueError("log_scale and bias belong together: give both or neither")


def refuses(plu: Plu) -> str:
    """Why the kernels cannot take these factors; "" where they can."""
    dtype = plu.lower.dtype
    if any(t is not None and t.dtype != dtype for t in plu[2:]):
        return "factors of several dtypes"
    if plu.sign.requires_grad and torch.is_grad_enabled():
        return "a gradient of the signs"
    if plu.lower.device.type == "cuda" and plu.lower.shape[-1] > MAX_CUDA_DIM:
        return f"more than {MAX_CUDA_DIM} columns"
    return ""


def run(plu: Plu, need_inverse: bool) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """`reference.plu_assemble` of factors that fit each other, by the kernels where they take them."""
    if any(usable(backend, plu.lower) for backend in BACKENDS) and not refuses(plu):
        return assemble(plu, need_inverse)
    if need_inverse and exporting_onnx():
        return _by_products(plu)
    return reference.plu_assemble(*plu, need_inverse=need_inverse)


def _by_products(plu: Plu) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same with A⁻¹, of operations that ONNX knows, which has no triangular solve.

    With T = D (I − N) and N strictly triangular, T⁻¹ = (I + N)(I + N²)(I + N⁴)… D⁻¹.
    """
    A, _, c, logabsdet = reference.plu_assemble(*plu, need_inverse=False)
    dim = plu.lower.shape[-1]
    eye = torch.eye(dim, dtype=plu.lower.dtype, device=plu.lower.device)
    diagonal = plu.sign * torch.exp(plu.log_diag)

    def inverse(N: Tensor) -> Tensor:
        found, power = eye + N, N
        for _ in range((dim - 1).bit_length() - 1):
            power = power @ power
            found = found @ (eye + power)
        return found

    U_inv = inverse(-plu.upper.triu(1) / diagonal.unsqueeze(-1)) / diagonal.unsqueeze(-2)
    W_inv = U_inv @ inverse(-plu.lower.tril(-1)) @ reference.permutation_matrix(plu.permutation, eye.dtype).mT
    return A, W_inv if plu.log_scale is None else W_inv * torch.exp(-plu.log_scale).unsqueeze(-2), c, logabsdet


def assemble(plu: Plu, need_inverse: bool) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The same by the kernels, which take these factors."""
    *batch, dim = plu.permutation.shape
    flat = len(batch) == 1

    def rows(t: Tensor | None, inner: tuple[int, ...]) -> Tensor | None:
        if t is None:
            return None
        return (t if flat else t.reshape(-1, *inner)).contiguous()

    square = ("lower", "upper")
    tensors = [rows(t, (dim, dim) if name in square else (dim,)) for name, t in zip(Plu._fields, plu, strict=True)]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        A, A_inv, c, logabsdet = _PLUAssemble.apply(need_inverse, *tensors)
    else:
        A, A_inv, c, logabsdet = operations.plu_assemble.default(*tensors, need_inverse)
    if not flat:
        A, c, logabsdet = A.view(*batch, dim, dim), c.view(*batch, dim), logabsdet.view(batch)
        A_inv = A_inv.view(*batch, dim, dim) if need_inverse else None
    return A, A_inv if need_inverse else None, c, logabsdet


class _PLUAssemble(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, need_inverse: bool, *tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        A, A_inv, c, logabsdet = operations.plu_assemble.default(*tensors, need_inverse)
        ctx.need_inverse = need_inverse
        if tensors[Plu._fields.index("log_scale")] is None:
            ctx.mark_non_differentiable(c)  # zero
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(A, A_inv, *tensors)
        return A, A_inv, c, logabsdet

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        A, A_inv, *tensors = ctx.saved_tensors
        if plain_gradients_wanted(grads):

            def run(*tensors: Tensor) -> tuple[Tensor, ...]:
                out = reference.plu_assemble(*tensors, need_inverse=ctx.need_inverse)
                return tuple(t for t, g in zip(out, grads, strict=True) if t is not None and g is not None)

            given = [g for g in grads if g is not None]
            return None, *differentiate(run, tensors, ctx.needs_input_grad[1:], given)
        grad_A, grad_A_inv, grad_c, grad_logabsdet = (None if g is None else g.contiguous() for g in grads)
        found = operations.plu_assemble_backward.default(
            *tensors, A, A_inv if ctx.need_inverse else None, grad_A, grad_A_inv if ctx.need_inverse else None, grad_c,
            grad_logabsdet,
        )  # fmt: skip
        return None, *gradients(found)


def gradients(found: list[Tensor]) -> list[Tensor | None]:
    """The results of `plu_assemble_backward` by the fields of `Plu`: three, and two of an ActNorm if there is one."""
    lower, upper, log_diag, *of_actnorm = found
    return [None, lower, upper, log_diag, None, *(of_actnorm or (None, None))]
