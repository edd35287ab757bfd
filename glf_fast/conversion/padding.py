"""The cost of stacking: a CouplingFlow has one width for all its steps, and halves of D′ − D′//2 and D′//2 columns.

Everything else is padded with zeros, which take time like other numbers. Costs are multiply-adds for each sample: those of
the networks and of the affine maps, of which permutations are gathers instead where they are wide.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from glf_fast.conversion.layers import TRAINED, Coupling, Dense, Layer, Unfusable, width

__all__ = ["divided", "fastest", "hidden_widths", "only_permutes", "padded_dim"]

# One launch more is worth so many multiply-adds: 65 µs forward, 180 µs with backward, on one core with 256 samples.
_LAUNCH = 10_000
# The cost of a library's own layer besides its multiply-adds, in the same unit: dozens of small operations, passes over D
# columns, and over every hidden unit. Measured on one core with 256 samples, eighteen couplings of 20 to 784 columns and 8
# to 1,000 hidden units: those that cost more, fused, were 0.1 to 0.8 times as fast as the library's, the others 0.95 to 2.5.
# Permutations were products with matrices then, and their D² multiply-adds are in those costs.
_LAYER, _COLUMN, _UNIT = 10_000, 200, 150
# Elements of a weight, 512 × 512 and 724 × 724, from which nearly all time goes into products, which nobody computes faster
# than the processor can. Steps of three projects' flows (Zen 3, two threads): couplings of splines with residual networks of
# 512 were 0.85 times as fast fused as by themselves, and are 1.15 times as fast with their own networks; affine couplings
# of 2 × 512 are 1.05 times as fast fused, of 3 × 1,024 0.95 times, and 0.97 times with their own networks. AllInOneBlocks of
# 512 columns, whose networks have 768 units, are 0.9 to 1.0 times as fast fused, and 1.15 to 1.2 times with their own networks;
# of 256 columns 1.3 and 1.1 times.
_WIDE_OWN, _WIDE = 1 << 18, 1 << 19


# Columns from which the processor's kernels gather what a permutation moves (csrc/cpu/permutations.h), and what that costs of
# the product with its matrix, which is still made and read in each pass. Measured with 784 columns: couplings of 512 units are
# as fast fused as by themselves (Zen 3, two threads).
# Padded couplings are counted as they were measured: 1 of 512 columns with 64 units, fused, is half as fast for its padding.
_GATHERED, _GATHER = 32, 0.4


def only_permutes(layers: Iterable[Layer]) -> bool:
    """Whether the affine maps between these layers are permutations of scaled columns, all of them."""
    return not any(isinstance(layer, Dense) for layer in layers)


def padded_dim(dim: int, couplings: Sequence[Coupling]) -> int:
    """The smallest D′ ≥ D with room for all passive columns in D′ − D′//2, and for all transformed ones in D′//2."""
    if all(len(coupling.transformed) == dim // 2 for coupling in couplings) and dim > 1:
        return dim
    passive = max(len(coupling.passive) for coupling in couplings)
    transformed = max(len(coupling.transformed) for coupling in couplings)
    return max(2 * transformed, 2 * passive - 1, 2)


def hidden_widths(couplings: Sequence[Coupling]) -> list[int]:
    """The widest of each hidden layer, or of the blocks."""
    return [max(widths) for widths in zip(*(coupling.conditioner.hidden for coupling in couplings), strict=True)]


def divided(couplings: Sequence[Coupling], permuted: bool = False) -> list[list[Coupling]]:
    """Couplings of one kind in runs, so that padding and launches together cost the least; `permuted` as in `fastest`."""
    if len({_sizes(coupling) for coupling in couplings}) == 1:  # nothing is padded for another coupling
        return [list(couplings)]
    # best[j]: the cost of the first j couplings, and where the last of their runs starts.
    best = [(0, 0)]
    for stop in range(1, len(couplings) + 1):
        best.append(min((best[i][0] + _cost(couplings[i:stop], permuted) + _LAUNCH, i) for i in range(stop)))
    runs: list[list[Coupling]] = []
    stop = len(couplings)
    while stop:
        start = best[stop][1]
        runs.insert(0, list(couplings[start:stop]))
        stop = start
    return runs


def fastest(coupling: Coupling, permuted: bool = False) -> Coupling:
    """The coupling, with `own_network` where the kernels would be slower than the library's own layer is, on a processor.

    `permuted`: the affine maps around it do nothing but permute and scale columns, see `only_permutes`.

    Raises Unfusable where they would, and there is none. On a GPU the library's dozens of launches for each layer cost more
    than multiply-adds do: nobody asks there.
    """
    mlp = coupling.conditioner
    own = sum(int(((W != 0) | (roles == TRAINED)).sum()) for W, roles in zip(mlp.weights, mlp.roles, strict=True))
    dim = width(coupling)
    fused = _cost([coupling], permuted)
    units = (2 if mlp.separate else 1) * sum(W.shape[-1] for W in mlp.weights[:-1])
    widest = max(mlp.weights, key=lambda W: W.shape[-2] * W.shape[-1]).shape[-2:]
    if math.prod(widest) >= _WIDE and (coupling.spline is None or coupling.own_network is None):
        sizes = " × ".join(f"{n:,}" for n in widest)
        raise Unfusable(f"has layers of {sizes}, whose products take all time, fused or not")
    profits = coupling.gains or coupling.spline is not None
    if profits and coupling.own_network is not None and math.prod(widest) >= _WIDE_OWN:
        return replace(coupling, conditioner=coupling.own_network)
    if coupling.gains and not permuted:
        # It saves passes, too. Ten AllInOneBlocks of 373 columns and 2 × 256 units took 1.5 times as long fused as by
        # themselves while the maps were products, and were 1.1 times as fast with their own networks (Zen 3). With gathers they
        # are some 3 times as fast, fused (a busy Zen 3).
        few = fused <= own + _UNIT * units // 2 + _LAYER
        return coupling if few else replace(coupling, conditioner=coupling.own_network)
    if fused <= own + _UNIT * units + _COLUMN * dim + _LAYER:
        return coupling
    raise Unfusable(
        f"transforms {len(coupling.transformed)} of {dim} columns with {own:,} multiply-adds for each sample; fused it "
        f"would take {fused:,}, which on a processor is slower"
    )


def _sizes(coupling: Coupling) -> tuple[int, ...]:
    """All that padding depends on."""
    return len(coupling.passive), len(coupling.transformed), coupling.context_dim(), *hidden_widths([coupling])


def _cost(couplings: Sequence[Coupling], permuted: bool) -> int:
    """Multiply-adds for each sample of those couplings, stacked."""
    kind, dim = couplings[0].kind(), padded_dim(width(couplings[0]), couplings)
    context = max(coupling.context_dim() for coupling in couplings)
    outputs = couplings[0].columns() * (dim // 2)
    hidden = hidden_widths(couplings)
    if couplings[0].conditioner.blocks:
        H = hidden[0]
        network = H * (dim - dim // 2 + context + len(hidden) * (2 * H + context) + outputs)
    else:
        widths = [dim - dim // 2 + context, *hidden, outputs]
        network = (2 if kind == "separate" else 1) * sum(a * b for a, b in itertools.pairwise(widths))
    gathered = permuted and dim == width(couplings[0]) and dim >= _GATHERED
    affine = round(_GATHER * dim**2) if gathered else dim**2
    return len(couplings) * (affine + network)
