"""Invertible linear layer: a learned mixing of all channels between couplings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glf_fast import ops
from glf_fast.flow.indices import Indices
from glf_fast.ops.backends import ordinary
from glf_fast.ops.checks import check_channels, check_choice

__all__ = ["LINEAR_TENSORS", "FixedInverse", "InvertibleLinear", "assemble"]

# Parametrisation → the parameters and buffers that it stores.
LINEAR_TENSORS: dict[str, tuple[str, ...]] = {
    "plu": ("lower", "upper", "log_diag", "sign", "permutation"),
    "dense": ("weight",),
    "permutation": ("permutation",),
}


class FixedInverse:
    """log|det W| and W⁻¹ of matrices that are not trained, for as long as these keep their values.

    They were a tenth of a training step of 8 layers of 256 columns (Zen 3). Copies and pickles of it are empty.
    """

    def __init__(self) -> None:
        self._known: tuple[Tensor, Tensor, Tensor] | None = None  # a copy of W, log|det W|, W⁻¹

    def __getstate__(self) -> dict[str, Any]:
        return {"_known": None}

    def of(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """log|det W| (…), which the caller may change, and W⁻¹ (…, D, D)."""
        if W.device.type != "cpu" or not ordinary():
            return ops.slogdet_inverse(W)[1:3]
        known = self._known  # once: another thread may replace it meanwhile
        if known is None or not ops.identical([W], [known[0]]) or (torch.is_grad_enabled() and known[1].is_inference()):
            known = self._known = (W.clone(), *ops.slogdet_inverse(W)[1:3])
        return known[1].clone(), known[2]


def assemble(
    linear: str,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    log_scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    need_inverse: bool = True,
    fixed: FixedInverse | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The affine maps x A + c of linear layers with the ActNorms (`log_scale`, `bias`) before them, if any.

    `tensors` are those of `LINEAR_TENSORS[linear]`, with any leading dimensions (…). `fixed` knows their determinants and
    inverses where they are not trained.
    Returns A (…, D, D), A⁻¹ (may be None unless `need_inverse`), c (…, D) and log|det A| (…).
    """
    if linear == "plu":
        return ops.plu_assemble(
            tensors["permutation"], tensors["lower"], tensors["upper"], tensors["log_diag"], tensors["sign"],
            log_scale, bias, need_inverse=need_inverse,
        )  # fmt: skip
    if linear == "permutation":
        return _permuted(tensors["permutation"], dtype, log_scale, bias, need_inverse)
    W = tensors["weight"]
    logabsdet, W_inv = ops.slogdet_inverse(W)[1:3] if fixed is None or W.requires_grad else fixed.of(W)
    return ops.fold_actnorm(W, W_inv if need_inverse else None, logabsdet, log_scale, bias)


def _permuted(
    permutation: Tensor, dtype: torch.dtype, log_scale: Tensor | None, bias: Tensor | None, need_inverse: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Those of yᵢ = ((x + b)·e^s)_perm(i): column i of A has one entry, in row perm(i). No product is needed."""
    zeros = permutation.new_zeros(*permutation.shape, permutation.shape[-1], dtype=dtype)  # (…, D, D)
    if log_scale is None or bias is None:
        s = c = torch.zeros_like(permutation, dtype=dtype)
        scale = s.exp()
    else:
        s = log_scale.gather(-1, permutation)
        scale = s.exp()
        c = bias.gather(-1, permutation) * scale
    A = zeros.scatter(-2, permutation.unsqueeze(-2), scale.unsqueeze(-2))
    A_inv = zeros.scatter(-1, permutation.unsqueeze(-1), torch.exp(-s).unsqueeze(-1)) if need_inverse else None
    return A, A_inv, c, s.sum(-1)


def _random_rotation(dim: int) -> Tensor:
    """An orthogonal matrix, uniformly distributed (QR of a Gaussian one, signs fixed)."""
    Q, R = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64))
    return Q * R.diagonal().sign()


class InvertibleLinear(nn.Module):
    """y = x W over the channels of vectors (B, D) or images (B, D, H, W); log|det J| = pixels·log|det W|.

    | `linear`      | W                      | log|det W|   | cost of a new W | starts as         |
    |---------------|------------------------|--------------|-----------------|-------------------|
    | `plu`         | P L (U + diag(±e^d))   | Σ d          | O(D³) product   | a random rotation |
    | `dense`       | free                   | slogdet      | O(D³) LU        | a random rotation |
    | `permutation` | fixed: yᵢ = x_perm(i)  | 0            | none            | random            |

    `plu`, the default, can never become singular and needs no determinant: Glow (arXiv:1807.03039), eqs. 10, 11.

    Args:
        dim: D.
        linear: the parametrisation.
        permutation: perm (D,) of "permutation", in place of a random one; `range(dim)[::-1]` reverses the channels.
    """

    _fixed: FixedInverse | None = None  # of what was pickled before there was one

    def __init__(self, dim: int, *, linear: str = "plu", permutation: Sequence[int] | Tensor | None = None) -> None:
        super().__init__()
        check_choice("linear", linear, LINEAR_TENSORS)
        self.dim = dim
        self.linear = linear
        self._indices: Indices | None = None
        if linear == "permutation":
            if permutation is not None and sorted(map(int, permutation)) != list(range(dim)):
                raise ValueError(f"permutation must hold each of 0 … {dim - 1} once; got {list(permutation)}")
            order = torch.randperm(dim) if permutation is None else torch.tensor([int(i) for i in permutation])
            self.register_buffer("permutation", order)
            self._indices = Indices("permutation", order)
            return
        if permutation is not None:
            raise ValueError(f'permutation is the order of linear="permutation"; got one with linear={linear!r}')
        W = _random_rotation(dim)
        dtype = torch.get_default_dtype()
        if linear == "dense":
            self.weight = nn.Parameter(W.to(dtype).contiguous())  # QR returns columns first
            self._fixed = FixedInverse()
            return
        P, L, U = torch.linalg.lu(W)
        diag = U.diagonal()
        self.lower = nn.Parameter(L.tril(-1).to(dtype).contiguous())
        self.upper = nn.Parameter(U.triu(1).to(dtype).contiguous())
        self.log_diag = nn.Parameter(diag.abs().log().to(dtype))
        self.register_buffer("sign", diag.sign().to(dtype))
        self.register_buffer("permutation", P.argmax(1))
        self._indices = Indices("permutation", self.get_buffer("permutation"))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x W and its logdet (B,); the context is not used."""
        if self.linear == "permutation":
            return self._permute("x", x, self.indices())
        W, _, c, logabsdet = self._assembled(need_inverse=False)
        return ops.invertible_linear(x, W, c, logabsdet)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z W⁻¹ and its logdet (B,)."""
        if self.linear == "permutation":
            return self._permute("z", z, self.indices().argsort())
        _, W_inv, c, logabsdet = self._assembled(need_inverse=True)
        assert W_inv is not None
        return ops.invertible_linear(z, W_inv, c, logabsdet, inverse=True)

    def indices(self) -> Tensor:
        """The permutation (D,) of "plu" and "permutation", with its values also where they were averaged."""
        assert self._indices is not None
        return self._indices.check(self.get_buffer("permutation"), self._buffers.get("sign"))

    def train(self, mode: bool = True) -> InvertibleLinear:
        """Set the mode. An averaged permutation is restored here, too: in compiled and exported calls it cannot be."""
        super().train(mode)
        if self._indices is not None:
            self.indices()
        return self

    def tensors(self) -> dict[str, Tensor]:
        """The parameters and buffers of this parametrisation, by name."""
        names = LINEAR_TENSORS[self.linear]
        return {name: self.indices() if name == "permutation" else getattr(self, name) for name in names}

    def _assembled(self, *, need_inverse: bool) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        tensors = self.tensors()
        dtype = next(iter(tensors.values())).dtype
        return assemble(self.linear, tensors, dtype, need_inverse=need_inverse, fixed=self._fixed)

    def _permute(self, name: str, x: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        check_channels(name, x, self.dim)
        if x.ndim == 4 and x.stride(1) == 1 and not x.is_contiguous():
            # In channels_last order a gather over rows of channels stays in it, and takes a thirtieth of the time.
            rows = x.movedim(1, -1)
            y = rows.reshape(-1, self.dim).index_select(1, order).view(rows.shape).movedim(-1, 1)
        else:
            y = x.index_select(1, order)
        return y, x.new_zeros(len(x), dtype=torch.promote_types(x.dtype, torch.float32))

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self._indices is not None:
            self.indices()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, metadata: Any, strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if self._indices is not None:
            self._indices.load(self.get_buffer("permutation"), errors)

    def extra_repr(self) -> str:
        """Shown by repr."""
        return f"{self.dim}, linear={self.linear!r}"
