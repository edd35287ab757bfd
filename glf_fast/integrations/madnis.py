"""The interface of MadNIS' flows: importance sampling on the unit cube, with one flow for each channel. Needs no madnis."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from glf_fast.flow import CouplingFlow, FlowEnsemble
from glf_fast.ops.checks import check_integer
from glf_fast.reference import Spline

__all__ = ["Flow"]

Channel = Tensor | Sequence[int] | int | None


class Flow(nn.Module):
    """A flow of rational-quadratic splines on [0, 1]^D with a uniform base, as madnis' `Flow` is, for its `Integrator`.

    All channels are one `FlowEnsemble`: they run in one call, on as many rows each as the most frequent of them has. A fresh
    flow is uniform. Points outside of the cube stay where they are.

    Args:
        dims_in: D, at least 2.
        channels: number of channels; None for one flow without channels.
        dims_c: columns of the condition; 0 for none.
        blocks: number of couplings; by default 2·⌈log₂ D⌉, in which every dimension is transformed given every other one,
            and in half of the couplings (one fewer for some dimensions of an odd D).
        layers, units: of each network, the output layer included.
        bins: of the splines.
        channel_remap_function: from channels (n,) to those whose flows are used, as `Integrand.remap_channels`.

    Raises:
        TypeError, ValueError: sizes that are no whole numbers, or too small.

    Example:
        >>> flow = Flow(3, channels=2)
        >>> x, prob = flow.sample(10, channel=torch.tensor([0, 1] * 5), return_prob=True)
        >>> x.shape, prob.shape
        (torch.Size([10, 3]), torch.Size([10]))
    """

    def __init__(
        self,
        dims_in: int,
        channels: int | None = None,
        *,
        dims_c: int = 0,
        blocks: int | None = None,
        layers: int = 3,
        units: int = 32,
        bins: int = 10,
        channel_remap_function: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        check_integer("dims_in", dims_in, 2)
        check_integer("layers", layers, 2)
        if channels is not None:
            check_integer("channels", channels, 1)
        self.dims_in = dims_in
        self.dims_c = dims_c
        self.channels = channels
        self.channel_remap_function = channel_remap_function
        orders = _orders(dims_in, 2 * math.ceil(math.log2(dims_in)) if blocks is None else blocks)
        flows = []
        for _ in range(channels or 1):
            flow = CouplingFlow(
                dims_in, len(orders), (units,) * (layers - 1), dims_c, coupling="spline", activation="relu",
                spline=Spline(bins, 0.0, 1.0, tails="none", parametrization="madnis"), linear="permutation", actnorm=False,
            )  # fmt: skip
            flow.load_state_dict({**flow.state_dict(), "linear_permutation": orders})
            flows.append(flow)
        self.flows = FlowEnsemble.from_flows(flows)

    def log_prob(self, x: Tensor, c: Tensor | None = None, channel: Channel = None) -> Tensor:
        """log p(x) in nats, (n,).

        Args:
            x: (n, D).
            c: condition (n, C), if the flow has one.
            channel: a channel for each sample (n,), the number of samples in each channel, one channel for all samples, or
                None for equally many samples of each, one channel after the other.

        Raises:
            ValueError: shapes, or channels, that do not fit.
        """
        place, rows = self._places(len(x), channel, x.device)
        _, logdet = self.flows(self._spread(x, place, rows), None if c is None else self._spread(c, place, rows))
        return logdet[place]

    def prob(self, x: Tensor, c: Tensor | None = None, channel: Channel = None) -> Tensor:
        """p(x), (n,); arguments as in `log_prob`."""
        return self.log_prob(x, c, channel).exp()

    def sample(
        self,
        n: int | None = None,
        c: Tensor | None = None,
        channel: Channel = None,
        return_log_prob: bool = False,
        return_prob: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Samples (n, D), and if asked for their log-probabilities (n,) and their probabilities (n,); differentiable.

        Args:
            n: number of samples; by default as many as there are conditions.
            c, channel: as in `log_prob`.
            device, dtype: of the samples, if there is no condition; by default those of the flow.
        """
        like = next(self.parameters()) if c is None else c
        if n is None:
            if c is None:
                raise ValueError("give the number of samples n, or a condition for each sample")
            n = len(c)
        z = torch.rand(n, self.dims_in, device=device or like.device, dtype=dtype or like.dtype)
        place, rows = self._places(n, channel, z.device)
        x, logdet = self.flows.inverse(
            self._spread(z, place, rows), None if c is None else self._spread(c, place, rows)
        )
        log_prob = -logdet[place].to(z.dtype)
        # Of a sample at the edge rounding must not leave the cube, on which alone integrands are defined.
        samples = x[place].to(z.dtype).clamp(0, 1)
        more = [log_prob] * return_log_prob + [log_prob.exp()] * return_prob
        return (samples, *more) if more else samples

    def _places(self, n: int, channel: Channel, device: torch.device) -> tuple[tuple[Tensor, Tensor], int]:
        """For each of n samples its channel, and its place among those of the channel; and the most samples of a channel."""
        members = len(self.flows)
        if isinstance(channel, Sequence):
            if len(channel) != members or sum(channel) != n:
                raise ValueError(
                    f"channel must be {members} numbers of samples that add up to {n}; got {list(channel)}"
                )
            channel = torch.arange(members).repeat_interleave(torch.tensor(list(channel))).to(device)
        elif channel is None:
            if n % members:
                raise ValueError(f"{n} samples cannot be divided equally among {members} channels: give their channels")
            channel = torch.arange(members, device=device).repeat_interleave(n // members)
        else:
            whole = isinstance(channel, Tensor)
            channel = channel.to(device) if isinstance(channel, Tensor) else torch.full((n,), channel, device=device)
            if self.channel_remap_function is not None:
                channel = self.channel_remap_function(channel)
            if channel.shape != (n,) or channel.is_floating_point():
                raise ValueError(f"channel must be {n} integers; got shape {tuple(channel.shape)}, {channel.dtype}")
            if n and not (int(channel.min()) >= 0 and int(channel.max()) < members):
                what = "channels" if whole else "a channel"
                raise ValueError(
                    f"channel must be {what} from 0 to {members - 1}; got {int(channel.min())} … {int(channel.max())}"
                )
        count = channel.bincount(minlength=members)
        order = channel.argsort(stable=True)
        within = torch.empty_like(channel)
        within[order] = torch.arange(n, device=device) - (count.cumsum(0) - count)[channel[order]]
        return (channel, within), int(count.max())

    def _spread(self, x: Tensor, place: tuple[Tensor, Tensor], rows: int) -> Tensor:
        """Samples (n, …) in their places (E, rows, …), in the flow's dtype; the others are in the middle of the cube."""
        like = next(self.parameters())
        return like.new_full((len(self.flows), rows, x.shape[1]), 0.5).index_put(place, x.to(like))


def _orders(dim: int, blocks: int) -> Tensor:
    """Permutations (blocks, dim) from the dimensions as the block before has left them; the last dim // 2 are transformed.

    Dimensions have binary words, which come in pairs of complements, so that every digit divides them into halves. Blocks
    2b and 2b + 1 divide them by digit b, and transform one half each. Any two dimensions differ in a digit: after all
    ⌈log₂ dim⌉ of them each was transformed given each other one. An odd dim lacks one word, that of ones alone; the zeros of
    a digit are then one too many, of which a different one each time is not transformed.
    """
    check_integer("blocks", blocks, 1)
    digits = math.ceil(math.log2(dim))
    even = dim + dim % 2
    words = [i if i < even // 2 else i + 2**digits - even for i in range(dim)]
    passed_over = [0] * dim
    before = list(range(dim))
    orders = []
    for block in range(blocks):
        bit = 1 << block // 2 % digits
        transformed = [i for i in range(dim) if bool(words[i] & bit) == (block % 2 == 0)]
        if len(transformed) > dim // 2:
            # Best is one that differs from no other dimension in this digit alone.
            out = min(transformed, key=lambda i, bit=bit: (passed_over[i], words[i] ^ bit in words))  # type: ignore[misc]
            passed_over[out] += 1
            transformed.remove(out)
        wanted = [i for i in range(dim) if i not in transformed] + transformed
        orders.append([before.index(i) for i in wanted])
        before = wanted
    return torch.tensor(orders)
