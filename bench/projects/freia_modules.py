"""Modules of public projects that use FrEIA, of code of their own: an old copy of its graph, splines, a graph that branches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import FrEIA.framework as ff
import FrEIA.modules as fm
import nflows.transforms.splines as splines
import torch
from torch import Tensor, nn

__all__ = ["CoupledGlow", "OldGraph", "SplineBlock", "UShaped", "convolutions"]


def convolutions(*kernels: int, width: int = 0) -> Callable[[int, int], nn.Module]:
    """Convolutions with ReLU between them; `width` 0: as wide as the input."""

    def net(n_in: int, n_out: int) -> nn.Module:
        channels = [n_in, *[width or n_in] * (len(kernels) - 1), n_out]
        layers: list[nn.Module] = []
        for i, kernel in enumerate(kernels):
            layers += [nn.Conv2d(channels[i], channels[i + 1], kernel, padding=kernel // 2), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    return net


class CoupledGlow(nn.Module):
    """A coupling in both directions, as a copy of an old FrEIA has it: with names of its own."""

    def __init__(self, columns: int, net: Callable[[int, int], nn.Module], clamp: float) -> None:
        super().__init__()
        self.columns = columns // 2
        self.s1, self.s2 = (net(self.columns, 2 * self.columns) for _ in range(2))
        self.clamp = clamp

    def affine(self, net: nn.Module, p: Tensor) -> tuple[Tensor, Tensor]:
        """The log-scale and the shift of a network's outputs."""
        u, t = net(p).chunk(2, 1)
        return self.clamp * 0.636 * torch.atan(u / self.clamp), t

    def forward(self, x: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        """x, or with `rev` its inverse, and log|det J| (B,)."""
        a, b = x.split(self.columns, 1)
        if rev:
            s1, t1 = self.affine(self.s1, a)
            b = (b - t1) / s1.exp()
            s2, t2 = self.affine(self.s2, b)
            return torch.cat([(a - t2) / s2.exp(), b], 1), -(s1.sum(1) + s2.sum(1))
        s2, t2 = self.affine(self.s2, b)
        a = s2.exp() * a + t2
        s1, t1 = self.affine(self.s1, a)
        return torch.cat([a, s1.exp() * b + t1], 1), s1.sum(1) + s2.sum(1)


class OldGraph(nn.Module):
    """Permutations and couplings of a copy of an old FrEIA."""

    def __init__(self, columns: int, blocks: int, net: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.orders = [torch.randperm(columns) for _ in range(blocks)]
        self.blocks = nn.ModuleList(CoupledGlow(columns, net, 3.0) for _ in range(blocks))

    def forward(self, x: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        """x, or with `rev` its inverse, and log|det J| (B,)."""
        logdet = x.new_zeros(len(x))
        steps = list(zip(self.orders, self.blocks, strict=True))
        for order, block in reversed(steps) if rev else steps:
            x, own = block(x if rev else x[:, order], rev)
            x = x[:, order.argsort()] if rev else x
            logdet = logdet + own
        return x, logdet


class SplineBlock(fm.InvertibleModule):
    """A coupling of splines of a project's own, with a fixed permutation behind it."""

    def __init__(self, dims_in: Any, dims_c: Any = (), subnet_constructor: Any = None, kind: str = "cubic") -> None:
        super().__init__(dims_in, dims_c)
        columns = dims_in[0][0]
        self.kept = columns - columns // 2
        self.kind = kind
        self.numbers = {"rational_quadratic": 29, "cubic": 22}[kind]
        conditions = sum(shape[0] for shape in dims_c)
        self.subnet = subnet_constructor(self.kept + conditions, self.numbers * (columns // 2))
        self.register_buffer("order", torch.randperm(columns))

    def forward(self, x: Any, c: Any = (), rev: bool = False, jac: bool = True) -> Any:
        """FrEIA's interface: (x,), or with `rev` its inverse, and log|det J| (B,)."""
        (x,) = x
        x = x[:, self.order.argsort()] if rev else x
        p, v = x[:, : self.kept], x[:, self.kept :]
        raw = self.subnet(torch.cat([p, *c], 1)).view(*v.shape, self.numbers)
        if self.kind == "cubic":
            widths, heights, left, right = raw.split([10, 10, 1, 1], -1)
            options = {"unnorm_derivatives_left": left, "unnorm_derivatives_right": right}
            function = splines.unconstrained_cubic_spline
        else:
            widths, heights, derivatives = raw.split([10, 10, 9], -1)
            options = {"unnormalized_derivatives": derivatives, "tails": "linear"}
            function = splines.unconstrained_rational_quadratic_spline
        w, logdet = function(v, widths, heights, inverse=rev, tail_bound=10.0, **options)
        y = torch.cat([p, w], 1)
        return (y if rev else y[:, self.order],), logdet.sum(1)

    def output_dims(self, input_dims: Any) -> Any:
        """FrEIA's interface: the input's."""
        return input_dims


class UShaped(nn.Module):
    """A graph of three inputs and three outputs, with their numbers in one row: a split of each scale goes to the one above."""

    def __init__(self) -> None:
        super().__init__()
        options = {"subnet_constructor": convolutions(3, 3), "affine_clamping": 2.0, "permute_soft": False}
        self.shapes = [(32, 4, 4), (12, 8, 8), (8, 16, 16)]
        nodes: list[Any] = [ff.InputNode(*shape) for shape in self.shapes]
        outputs: list[Any] = []
        below: Any = None
        for given in nodes[:]:
            last: Any = given.out0
            if below is not None:
                nodes.append(ff.Node(below, fm.IRevNetUpsampling, {}))
                nodes.append(ff.Node([last, nodes[-1].out0], fm.Concat, {"dim": 0}))
                last = nodes[-1].out0
            for _ in range(2):
                nodes.append(ff.Node(last, fm.AllInOneBlock, options))
                last = nodes[-1].out0
            if len(outputs) < 2:
                nodes.append(ff.Node(last, fm.Split, {}))
                last, below = nodes[-1].out0, nodes[-1].out1
            outputs.append(ff.OutputNode(last))
        self.graph = ff.GraphINN([*nodes, *outputs])
        self.noise = [tuple(node.input_dims[0]) for node in self.graph.out_nodes]

    def forward(self, x: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        """(B, 3 images in a row) → the noise in a row."""
        shapes = self.noise if rev else self.shapes
        parts = x.split([math.prod(shape) for shape in shapes], 1)
        y, jac = self.graph([part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)], rev=rev)
        return torch.cat([part.flatten(1) for part in y], 1), jac
