"""Affine layers between couplings, folded into as few maps y = ((x + b)·e^s) W as train what the library trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glf_fast.conversion.layers import Dense, Diagonal, Kept, Layer, Permutation, Piece, Transform, Unfusable

__all__ = ["REACH", "Affine", "fold", "identity", "inverted", "inverted_layers", "split_far_shifts"]


# An ActNorm that moves the data by more than this many of their standard deviations is a layer of its own: folded into the
# first step, a mean of 2 σ makes float32 errors of log_prob 1.1 times as large (of samples 1.4 times), 100 σ ten times.
# By itself it costs 0.1 ms of a training step on a processor.
REACH = 2.0
# A shift behind a matrix becomes one before it unless its rounding grows by more than this, in units of the shift or of the
# data: with a matrix of diagonal 1 … 0.1 (D = 6) float32 loses a factor of 11 in z, of 2 in log_prob. Apart, it costs a launch.
_LOSS = 2.0


@dataclass(frozen=True)
class Affine:
    """y = ((x + b)·e^s) W + c, with W either the permutation yᵢ = x_order(i) (W is None) or a matrix (D, D).

    `*_trained`: whether the library trains that part. `regular`: no trained factor of W can become singular. Maps
    that `fold` returns have c = 0.
    """

    s: Tensor
    b: Tensor
    c: Tensor
    order: Tensor
    W: Tensor | None = None
    s_trained: bool = False
    b_trained: bool = False
    c_trained: bool = False
    W_trained: bool = False
    regular: bool = True

    def scales(self) -> bool:
        """False if (x + b)·e^s = x, for good."""
        return self.s_trained or self.b_trained or bool(self.s.any()) or bool(self.b.any())

    def mixes(self) -> bool:
        """False if every column stays in its place."""
        return self.W is not None or not torch.equal(self.order, torch.arange(len(self.order)).to(self.order))

    def matrix(self) -> Tensor:
        """W (D, D), also of a permutation."""
        if self.W is not None:
            return self.W
        return torch.eye(len(self.order), dtype=self.s.dtype, device=self.s.device)[:, self.order]

    def reach(self) -> float:
        """max |b·e^s|: how many times its own size x + b may be when it is computed as x·e^s + b·e^s."""
        return float((self.b * self.s.exp()).detach().abs().max())


def identity(dim: int) -> Affine:
    """y = x on (B, dim), in float64 on the processor, where flows are converted."""
    zero = torch.zeros(dim, dtype=torch.float64, device="cpu")
    return Affine(zero, zero, zero, torch.arange(dim, device="cpu"))


def fold(pieces: Iterable[Piece], dim: int) -> list[Affine]:
    """The pieces, first to last, as maps whose product they are: nearly always one, at least one.

    There is a second one where a trained scale or a fixed shift follows a matrix in a way that ((x + b)·e^s) W with
    the same freedom cannot express, or where it would cost a shift its digits.
    """
    maps: list[Affine] = []
    affine = identity(dim)
    for piece in pieces:
        if not _absorbs(affine, piece):
            maps += _settle(affine)
            affine = identity(dim)
        affine = _append(affine, piece)
    return [*maps, *_settle(affine)]


def split_far_shifts(maps: Iterable[Affine], reach: float) -> list[Affine]:
    """The same maps, those of more than that reach as two: (x + b)·e^s, and W.

    Folded into x A + c, such a map subtracts large numbers that a matrix has rounded; x + b by itself is as good as exact.
    """
    parted = []
    for affine in maps:
        if affine.reach() > reach:
            unit = identity(len(affine.s))
            scale = replace(affine, order=unit.order, W=None, W_trained=False, regular=True)
            parted += [scale, replace(affine, s=unit.s, b=unit.b, s_trained=False, b_trained=False)]
        else:
            parted.append(affine)
    return parted


def inverted(piece: Piece) -> Piece:
    """The inverse map."""
    if isinstance(piece, Permutation):
        return Permutation(piece.order.argsort())
    if isinstance(piece, Diagonal):
        return replace(piece, log_scale=-piece.log_scale, shift=-piece.shift * torch.exp(-piece.log_scale))
    W_inv = torch.linalg.inv(piece.W)
    # A shift that does not exist stays one that nothing trains, though W is trained.
    shift = -piece.shift @ W_inv if _has_shift(piece) else piece.shift
    return replace(piece, W=W_inv, shift=shift)


def _has_shift(piece: Dense) -> bool:
    return piece.shift.requires_grad or bool(piece.shift.any())


def _absorbs(affine: Affine, piece: Piece) -> bool:
    """True if the product of both, with what is trained in each, is an `Affine` that can settle its c."""
    if isinstance(piece, Permutation):
        return True
    fixed_matrix = affine.W is not None and not affine.W_trained
    if isinstance(piece, Diagonal) and piece.trained:
        return not fixed_matrix
    # A fixed shift after something trained cannot move before it, unless another shift is trained.
    moves = affine.s_trained or affine.W_trained or piece.trained
    free = affine.b_trained or affine.c_trained or piece.trained
    return free or not moves or not piece.shift.any()


def _append(affine: Affine, piece: Piece) -> Affine:
    s, c, order, W = affine.s, affine.c, affine.order, affine.W
    if isinstance(piece, Permutation):
        if W is None:
            return replace(affine, order=order[piece.order], c=c[piece.order])
        return replace(affine, W=W[:, piece.order], c=c[piece.order])
    if isinstance(piece, Diagonal):
        scale = piece.log_scale.exp()
        c, c_trained = c * scale + piece.shift, affine.c_trained or piece.trained
        if W is not None:
            return replace(affine, W=W * scale, c=c, c_trained=c_trained)
        s = s.index_add(0, order, piece.log_scale)  # s[order[i]] += log_scale[i]
        return replace(affine, s=s, c=c, c_trained=c_trained, s_trained=affine.s_trained or piece.trained)
    if W is None:  # its shift can move before it without a solve
        affine = _settled(affine)
    return replace(
        affine,
        W=affine.matrix() @ piece.W,
        c=affine.c @ piece.W + piece.shift,
        c_trained=affine.c_trained or (piece.trained and _has_shift(piece)),
        W_trained=affine.W_trained or piece.trained,
        regular=affine.regular and (piece.regular or not piece.trained),
    )


def _settle(affine: Affine) -> list[Affine]:
    """The map with c moved before W, or, where that loses digits, W and then the shift."""
    settled = _settled(affine)
    if affine.W is None or settled is affine:
        return [settled]
    moved = (settled.b - affine.b) * torch.exp(affine.s)  # c W⁻¹, whose rounding comes back through W
    rounding = (moved.abs() @ affine.W.abs()).detach().max()
    if rounding <= _LOSS * affine.c.detach().abs().max().clamp(min=1):
        return [settled]
    shift = replace(identity(len(affine.c)), b=affine.c, b_trained=affine.c_trained)
    return [replace(affine, c=torch.zeros_like(affine.c), c_trained=False), shift]


def _settled(affine: Affine) -> Affine:
    """The same map with c moved before W: b + c W⁻¹ e^−s."""
    if not (affine.c_trained or affine.c.any()):
        return affine
    if affine.W is None:
        moved = torch.zeros_like(affine.c).index_copy(0, affine.order, affine.c)
    else:
        moved = torch.linalg.solve(affine.W.T, affine.c)
    b = affine.b + moved * torch.exp(-affine.s)
    trained = affine.b_trained or affine.c_trained
    return replace(affine, b=b, c=torch.zeros_like(affine.c), b_trained=trained, c_trained=False)


def inverted_layers(layers: Sequence[Layer]) -> list[Layer]:
    """The inverse of all layers, last to first; raises Unfusable for a layer that is kept."""
    turned: list[Layer] = []
    for layer in reversed(layers):
        if isinstance(layer, Kept):
            raise Unfusable(layer.reason)
        turned.append(replace(layer, undo=not layer.undo) if isinstance(layer, Transform) else inverted(layer))
    return turned
