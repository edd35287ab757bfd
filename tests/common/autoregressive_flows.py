"""Random masked autoregressive flows, and their operations as functions of a list of tensors."""

import itertools

import torch
from torch import Tensor

from glf_fast import Spline
from glf_fast.reference import fan_in

__all__ = ["NAMES", "flow_of", "tensors"]

NAMES = {False: "autoregressive_flow", True: "autoregressive_flow_inverse"}


def tensors(
    batch: int, K: int, D: int, C: int, hidden: tuple[int, ...], *, transform: str = "affine", network: str = "mlp",
    context_layer: bool = False, ties: bool = False,
    spline: Spline | None = None,
) -> tuple[list[Tensor | None], Tensor]:  # fmt: skip
    """x, A, c, context, W₀ …, b₀ …, and the fan-in of units of random degrees; with `ties` features share degrees."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=g)

    residual, columns = network != "mlp", (spline or Spline()).columns if transform == "spline" else 2
    widths = [D, *(hidden[:1] * (1 + 2 * len(hidden)) if residual else hidden), columns * D]
    layers = len(widths) - 1
    in_blocks = [network == "residual" and i % 2 == 1 and i + 1 < layers for i in range(layers)]
    enters = [not context_layer, *in_blocks[1:]]
    shapes = [(n + C * e, m) for (n, m), e in zip(itertools.pairwise(widths), enters, strict=True)]
    shapes += [(C, widths[1])] * context_layer
    weights = [normal(K, n, m) / max(n, 1) ** 0.5 for n, m in shapes]
    if transform == "spline":
        weights[layers - 1] *= 0.2
    seen = []
    for _ in range(K):
        features = sorted(torch.randint(0, D, (D,), generator=g).tolist()) if ties else list(range(1, D + 1))
        degrees = [sorted(torch.randint(0, D + 1, (n,), generator=g).tolist()) for n in widths[1:-1]]
        if residual:
            degrees = degrees[:1] * len(degrees)
        seen.append(fan_in(degrees, features))
    A = (torch.linalg.qr(normal(K, D, D)).Q + 0.1 * normal(K, D, D) / D).contiguous()
    values = [normal(batch, D), A, normal(K, D), normal(batch, C) if C else None, *weights]
    values += [0.3 * normal(K, m) for _, m in shapes]
    return [None if t is None else t.requires_grad_() for t in values], torch.tensor(seen)


def flow_of(op, seen: Tensor, **options):
    """The operation as a function of the list of tensors."""

    def flow(x, A, c, context, *layers):
        half = len(layers) // 2
        return op(x, A, c, layers[:half], layers[half:], seen, context, **options)

    return flow
