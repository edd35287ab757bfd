"""Glow: a multi-scale flow on images."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from glf_fast import ops
from glf_fast.flow.actnorm import ActNorm
from glf_fast.flow.affine_coupling import AffineCoupling
from glf_fast.flow.glow_network import GlowNetwork, check_gain_factor
from glf_fast.flow.linear import InvertibleLinear
from glf_fast.flow.sequential import SequentialFlow
from glf_fast.flow.split import Split
from glf_fast.flow.squeeze import Squeeze
from glf_fast.ops.checks import check_channels, check_choice, check_integer, check_log_scale, check_tensors

__all__ = ["GlowFlow", "TopPrior"]

COUPLINGS = ("affine", "additive")
MASKS = ("channels", "realnvp")


class TopPrior(nn.Module):
    """z = (v − μ)/σ per channel of images (B, D, H, W): a learned prior v ~ N(μ, σ²), which a context may shift and scale.

    With log σ = f(u), (u, μ) = parameters + context·weights, all of them zeros at the start: Glow (arXiv:1807.03039), released
    code, `learntop` and `ycond`.

    Args:
        dim: D.    context_dim: columns of the context (B, C); 0 for none.
        log_scale, log_scale_constant: name and constant of f, see `glf_fast.reference.log_scale`.
    """

    def __init__(
        self, dim: int, *, context_dim: int = 0, log_scale: str = "tanh", log_scale_constant: float | None = None
    ) -> None:
        super().__init__()
        check_log_scale(log_scale, log_scale_constant)
        self.dim = dim
        self.log_scale, self.log_scale_constant = log_scale, log_scale_constant
        self.raw = nn.Parameter(torch.zeros(2 * dim))
        self.weight = nn.Parameter(torch.zeros(context_dim, 2 * dim)) if context_dim else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → noise: (x − μ)/σ like x, and its logdet (B,)."""
        return self._run("x", x, context, inverse=True)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise → data: μ + σ·z like z, and its logdet (B,)."""
        return self._run("z", z, context, inverse=False)

    def _run(self, name: str, x: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
        check_channels(name, x, self.dim)
        raw = self.raw.expand(len(x), -1)
        if self.weight is not None:
            if context is None:
                raise ValueError(f"this prior is conditional: give a context of {len(self.weight)} columns")
            check_tensors(context=context)
            with torch.autocast(x.device.type, enabled=False):
                raw = raw + context.to(raw.dtype) @ self.weight
        u, t = (half.view(len(x), self.dim, 1, 1).expand_as(x) for half in raw.chunk(2, 1))
        return ops.affine_coupling(
            x, u, t, log_scale=self.log_scale, log_scale_constant=self.log_scale_constant, inverse=inverse
        )

    def extra_repr(self) -> str:
        """Shown by repr."""
        return f"{self.dim}"


class GlowFlow(SequentialFlow):
    """Glow (Kingma and Dhariwal, arXiv:1807.03039): at each of L levels a squeeze, K steps, and a split of the channels.

    A step is an `ActNorm`, an `InvertibleLinear` (the 1 × 1 convolution) and an `AffineCoupling` with a `GlowNetwork`. Each
    level but the last one factors half of its channels out by a `Split` with a learned Gaussian; the channels left at the end
    have a learned Gaussian, too. All these Gaussians are parts of the map, so z is standard normal, with as many numbers as x.

    | convention               | default                      | as in openai/glow                             |
    |--------------------------|------------------------------|-----------------------------------------------|
    | scale of a coupling      | e^(2 tanh(u/2))              | σ(u + 2): `log_scale="glow"`                  |
    | order in a coupling      | v·e^ℓ + t                    | (v + t)·e^ℓ: `add_first=True`                 |
    | log σ of the Gaussians   | 2 tanh(u/2)                  | u, unbounded: follows from `log_scale="glow"` |
    | log-gains of the outputs | `gain_factor=3`              | 3                                             |
    | 1 × 1 convolution        | PLU: `linear="plu"`          | free: `linear="dense"`                        |
    | padding                  | zeros, with a channel for it | likewise                                      |
    | rate of ActNorms' s      | that of all parameters       | 3 times as fast: s is 3 times a parameter     |
    | networks of Gaussians    | a plain convolution, or none | with gains, and a channel for the padding     |

    Args:
        image_shape: (C, H, W) of an image; H and W are multiples of 2^levels.
        levels: L, the number of squeezes.
        steps: K, the steps of each level.
        width: channels of the networks' hidden layers.
        coupling: "affine", or "additive" without a scale.
        context_dim: columns of a context, such as a class in one-hot form, which all networks and Gaussians are given; 0 for
            none.
        reversible: keep the activations of one step, see `SequentialFlow`: memory does not grow with K.
        linear: parametrisation of the 1 × 1 convolutions, see `InvertibleLinear`, by default "plu"; "permutation" shuffles
            channels.
        log_scale, log_scale_constant, add_first: of the couplings, see `AffineCoupling`.
        gain_factor: see `GlowNetwork`.
        masks: "channels", Glow's; "realnvp": those of RealNVP (arXiv:1605.08803, section 3.6). There each level has K steps
            with checkerboards in turn before its squeeze, and K with the halves of the channels in turn behind it, without
            1 × 1 convolutions. K should be even, so that both masks of a pair are used equally often; K = 1 is refused. The
            networks and learned Gaussians are Glow's.
        network: function that makes the network of a coupling from its numbers of input and output channels; by default
            `GlowNetwork` of this width.

    Raises:
        ValueError: an image whose sides cannot be halved L times, or an option that does not exist or would have no effect.

    Example:
        >>> flow = GlowFlow((1, 28, 28), levels=2, steps=2, width=16)
        >>> z, logdet = flow(torch.rand(4, 1, 28, 28))
        >>> z.shape, logdet.shape
        (torch.Size([4, 1, 28, 28]), torch.Size([4]))
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        levels: int = 3,
        steps: int = 32,
        width: int = 512,
        *,
        coupling: str = "affine",
        context_dim: int = 0,
        reversible: bool = False,
        linear: str | None = None,
        log_scale: str = "tanh",
        log_scale_constant: float | None = None,
        add_first: bool = False,
        gain_factor: float = 3.0,
        masks: str = "channels",
        network: Callable[[int, int], nn.Module] | None = None,
    ) -> None:
        check_choice("coupling", coupling, COUPLINGS)
        check_choice("masks", masks, MASKS)
        for name, value, least in (
            ("levels", levels, 1),
            ("steps", steps, 1),
            ("width", width, 1),
            ("context_dim", context_dim, 0),
        ):
            check_integer(name, value, least)
        check_gain_factor(gain_factor)
        if coupling == "additive" and ((log_scale, log_scale_constant) != ("tanh", None) or add_first):
            raise ValueError(
                'coupling="additive" has no scale, so leave log_scale, log_scale_constant and add_first out; got '
                f"{log_scale!r}, {log_scale_constant} and {add_first}"
            )
        realnvp = masks == "realnvp"
        if realnvp and linear is not None:
            raise ValueError(f'masks="realnvp" has no 1 × 1 convolutions, so leave linear out; got {linear!r}')
        if realnvp and steps < 2:
            raise ValueError(
                'masks="realnvp" uses two masks in turn, so steps must be at least 2, and should be even; '
                f"with steps={steps} no coupling would change some of the values"
            )
        C = _channels(image_shape, levels)
        additive = coupling == "additive"

        def step(dim: int, k: int, mask: str = "channels") -> Iterator[nn.Module]:
            given, changed = (dim, dim) if mask == "checkerboard" else (dim - dim // 2, dim // 2)
            given, outputs = given + context_dim, changed if additive else 2 * changed
            yield ActNorm(dim)
            if not realnvp:
                yield InvertibleLinear(dim, linear="plu" if linear is None else linear)
            yield AffineCoupling(
                dim,
                GlowNetwork(given, outputs, width, gain_factor=gain_factor)
                if network is None
                else network(given, outputs),
                additive=additive,
                log_scale=log_scale,
                log_scale_constant=log_scale_constant,
                add_first=add_first,
                mask=mask,
                flip=realnvp and k % 2 == 1,
            )

        # In Glow's code the Gaussians' log σ is unbounded where the couplings' scale is σ(u + 2), which is not 1 at u = 0.
        prior: dict[str, Any] = {"log_scale": "exp" if log_scale == "glow" else "tanh", "context_dim": context_dim}
        layers: list[nn.Module] = []
        for level in range(levels):
            if realnvp:
                layers += chain.from_iterable(step(C, k, "checkerboard") for k in range(steps))
            layers.append(Squeeze())
            C *= 4
            layers += chain.from_iterable(step(C, k) for k in range(steps))
            if level < levels - 1:
                layers.append(Split(C, **prior))
                C -= C // 2
        layers.append(TopPrior(C, **prior))
        super().__init__(layers, image_shape, context_dim, reversible=reversible)
        self.levels, self.steps = levels, steps


def _channels(image_shape: Any, levels: int) -> int:
    """Channels of an image (C, H, W); raises ValueError unless its sides can be halved so many times."""
    shape = tuple(image_shape) if isinstance(image_shape, Iterable) else (image_shape,)
    integers = all(isinstance(n, numbers.Integral) and int(n) >= 1 for n in shape)
    if len(shape) != 3 or not integers or any(side % 2**levels for side in shape[1:]):
        raise ValueError(
            f"image_shape must be (channels, height, width) with sides that are multiples of 2^levels = {2**levels}; "
            f"got {shape}"
        )
    return int(shape[0])
