"""A few small calls of every kernel, for compute-sanitizer: `compute-sanitizer --tool memcheck python tools/gpu_sanitized.py`.

Affine flows of D 20, by CUDA's kernels and by Triton's, and of staged maps (D 96), with staged hidden layers, and spline
flows: forward, inverse and both backwards. Autoregressive flows in both directions. PLU layers that end within a patch;
dense matrices for a warp, for two rows a lane and for a block; the elementwise coupling. With
PYTORCH_NO_CUDA_MEMORY_CACHING=1 every tensor is an allocation, and what lies beyond it is seen. Results are looked at only
for being finite: tests/gpu has the values.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from glf_fast import AutoregressiveFlow, CouplingFlow, ops, use_backend

__all__ = ["main"]

ROWS = 40  # two programs and a half


def couplings(device: str, *kinds: tuple[int, str, tuple[int, ...]]) -> Iterable[Iterable[Tensor]]:
    """What calls of coupling flows of these sizes return."""
    for (dim, coupling, hidden), reversible in itertools.product(kinds, (False, True)):
        torch.manual_seed(0)
        flow = CouplingFlow(dim, 2, hidden, coupling=coupling, reversible=reversible).to(device)
        x = torch.randn(ROWS, dim, device=device, requires_grad=True)
        loss = -flow.log_prob(x).mean()
        yield torch.autograd.grad(loss, [x, *(p for p in flow.parameters() if p.requires_grad)])
        z, logdet = flow(x)
        yield torch.autograd.grad(z.sum() + logdet.sum(), [x])
        with torch.no_grad():
            yield flow.inverse(torch.randn(ROWS, dim, device=device))


def calls(device: str) -> Iterable[Iterable[Tensor]]:
    """What each call returns."""
    small = (20, "affine", (48, 33, 48))
    yield from couplings(device, small, (96, "affine", (48, 33, 48)), (20, "spline", (33,)))
    with use_backend("triton"):
        yield from couplings(device, small)
    for transform in ("affine", "spline"):
        torch.manual_seed(0)
        masked = AutoregressiveFlow(2, 1, (18,), 5, transform=transform, context_layer=True).to(device)
        x, context = (torch.randn(17, n, device=device, requires_grad=True) for n in (2, 5))
        yield torch.autograd.grad(-masked.log_prob(x, context).mean(), [x, context, *masked.mlp_weights])
        z, logdet = masked.inverse(x, context)
        yield torch.autograd.grad(z.sum() + logdet.sum(), [x, context, *masked.mlp_weights])
    flow = CouplingFlow(33, 3, (16,)).to(device)  # PLU layers of a patch and a row
    yield torch.autograd.grad(flow.log_prob(torch.randn(ROWS, 33, device=device)).sum(), list(flow.parameters()))
    for dim in (20, 64, 80):
        yield ops.slogdet_inverse(torch.randn(5, dim, dim, device=device))[:3]
    raw = torch.randn(4, 24, 6, 6, device=device).to(memory_format=torch.channels_last).requires_grad_()
    w, logdet = ops.affine_coupling(torch.randn(4, 12, 6, 6, device=device), *raw.chunk(2, 1))
    yield torch.autograd.grad(w.sum() + logdet.sum(), [raw])


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="On a processor, in Triton's interpreter.")
    rehearse = parser.parse_args().rehearse
    number = 0
    with use_backend("triton" if rehearse else "auto"):
        for number, results in enumerate(calls("cpu" if rehearse else "cuda"), 1):
            assert all(t.isfinite().all() for t in results), f"call {number} is not finite"
    print(f"{number} calls, all finite")


if __name__ == "__main__":
    main()
