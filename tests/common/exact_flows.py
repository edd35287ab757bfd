"""Flows of float32 numbers in float64, on any device, and how far an implementation's results are from the exact ones."""

import itertools

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from glf_fast import reference

__all__ = ["DIRECTIONS", "SIZES", "error", "names", "run", "tensors"]

DIRECTIONS = {"forward": "coupling_flow", "inverse": "coupling_flow_inverse"}
# D, hidden, context: of each size class of the launch table, with odd widths among them.
SIZES = {
    "small": (20, (64, 64), 0),
    "context": (7, (50, 33), 16),
    "deep": (31, (40, 64, 17, 64), 3),
    "medium": (64, (256, 256), 0),
    "large": (128, (512, 512), 0),
    "huge": (255, (300, 512), 0),
}
# A ReLU whose argument float32 puts on the other side of zero changes a gradient by 10⁻³ of its length, where all else is off
# by 10⁻⁶. It happens by chance, to one argument in some 10⁷ for each 10⁻⁷ of error, and 100,000 rows have 3·10⁷. Arguments are
# of order one, and off by less than 10⁻⁵.
MARGIN = 1e-5


def tensors(
    device: torch.device | str, batch: int, K: int, D: int, C: int, hidden: tuple[int, ...], direction: str = "forward"
) -> list[Tensor | None]:
    """x, A, c, context, W₀ …, b₀ …, float32 numbers in float64, with no ReLU within MARGIN of its switch."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).double().to(device)

    widths = [D - D // 2 + C, *hidden, 2 * (D // 2)]
    A = torch.linalg.qr(normal(K, D, D).cpu()).Q.contiguous().float().double().to(device)
    c = normal(K, D)
    weights = [(normal(K, n, m) / n**0.5).float().double() for n, m in itertools.pairwise(widths)]
    biases = [(0.3 * normal(K, n)).float().double() for n in widths[1:]]
    drawn = batch + batch // 4 + 8  # MARGIN costs two rows of a hundred where a row meets 3,000 ReLUs
    x, context = normal(drawn, D), normal(drawn, C) if C else None
    clear = _clear(x, A, c, weights, biases, context, direction).nonzero()[:batch, 0]
    assert len(clear) == batch, f"only {len(clear)} of {drawn} rows keep their distance"
    return [x[clear], A, c, context if context is None else context[clear], *weights, *biases]


class _Arguments(TorchDispatchMode):
    """The smallest |argument| of a ReLU in each row."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.least = torch.full_like(rows[:, 0], torch.inf)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.relu.default:
            self.least = torch.minimum(self.least, args[0].abs().amin(1))
        return function(*args, **(kwargs or {}))


def _clear(x: Tensor, A: Tensor, c: Tensor, weights: list, biases: list, context: Tensor | None, direction: str):
    with torch.no_grad(), _Arguments(x) as arguments:
        getattr(reference, DIRECTIONS[direction])(x, A, c, weights, biases, context)
    return arguments.least > MARGIN


def run(op, values: list[Tensor | None], dtype: torch.dtype, **options) -> list[Tensor]:
    """Output, logdet, and the gradients of a fixed combination of them."""
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in values]
    x, A, c, context, *layers = leaves
    results = op(x, A, c, layers[: len(layers) // 2], layers[len(layers) // 2 :], context, **options)
    g = torch.Generator().manual_seed(1)
    grads = [torch.randn(t.shape, generator=g).to(t) for t in results]
    # The reference's logdet of additive couplings is a constant.
    varying, grads = zip(*((t, g) for t, g in zip(results, grads, strict=True) if t.requires_grad), strict=True)
    found = torch.autograd.grad(varying, [t for t in leaves if t is not None], grads)
    return [t.detach() for t in (*results, *found)]


def names(values: list[Tensor | None]) -> list[str]:
    """Of what `run` returns."""
    layers = range((len(values) - 4) // 2)
    leaves = ["x", "A", "c", "context", *(f"{kind}{i}" for kind in "Wb" for i in layers)]
    return ["out", "logdet", *(name for name, t in zip(leaves, values, strict=True) if t is not None)]


def error(got: Tensor, want: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30))
