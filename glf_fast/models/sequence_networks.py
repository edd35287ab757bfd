"""Encoder and decoder of sequences, with the networks of the Grammar VAE (arXiv:1703.01925)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["GRU", "SequenceDecoder", "SequenceEncoder"]


class SequenceEncoder(nn.Module):
    """Convolutions along a sequence, each with ReLU and batch norm, a dense layer with ReLU, and a dense layer.

    Args:
        length, symbols: shape of a sequence of one-hot symbols.    outputs: numbers that the encoder gives.
        channels, kernels: of the convolutions, which have no padding.    dense: units of the dense layer.

    Raises:
        ValueError: sequences that are shorter than what the convolutions need.
    """

    def __init__(
        self, length: int, symbols: int, outputs: int, channels: Sequence[int], kernels: Sequence[int], dense: int
    ) -> None:
        super().__init__()
        if length <= (lost := sum(kernels) - len(kernels)):
            raise ValueError(
                f"sequences of {length} symbols are too short for kernels {tuple(kernels)}; give {lost + 1}"
            )
        layers: list[nn.Module] = []
        for before, after, kernel in zip([symbols, *channels], channels, kernels, strict=False):
            layers += [nn.Conv1d(before, after, kernel), nn.ReLU(), nn.BatchNorm1d(after)]
        self.symbols = symbols
        self.convolutions = nn.Sequential(*layers)
        self.dense = nn.Linear(channels[-1] * (length - lost), dense)
        self.head = nn.Linear(dense, outputs)

    def forward(self, symbols: Tensor) -> Tensor:
        """Symbols (B, length) → (B, outputs)."""
        x = F.one_hot(symbols, self.symbols).mT.to(self.head.weight.dtype)
        codes = self.head(F.relu(self.dense(self.convolutions(x).flatten(1))))
        return codes.to(x.dtype)  # of low precision under autocast, until here


class SequenceDecoder(nn.Module):
    """A batch norm, a dense layer with ReLU, gated recurrent units that see its output at each step, and a dense layer.

    Args:
        length, symbols: shape of a sequence of scores of symbols.    latent_dim: length of a code.
        units, layers: units of each recurrent layer, and their number.
    """

    def __init__(self, length: int, symbols: int, latent_dim: int, units: int, layers: int) -> None:
        super().__init__()
        self.length = length
        self.norm = nn.BatchNorm1d(latent_dim)
        self.dense = nn.Linear(latent_dim, latent_dim)
        self.recurrent = nn.ModuleList(GRU(units if i else latent_dim, units) for i in range(layers))
        self.head = nn.Linear(units, symbols)

    def forward(self, z: Tensor) -> Tensor:
        """Codes z (B, latent_dim) → scores (B, length, symbols)."""
        x = F.relu(self.dense(self.norm(z)))[None]
        for layer in self.recurrent:
            x = layer(x, self.length)
        return self.head(x).transpose(0, 1).to(z.dtype)


class GRU(nn.Module):
    """A layer of gated recurrent units (Cho et al., arXiv:1406.1078), with the formulas of `torch.nn.GRU`.

    It is made of dense layers, so that weights can be normalised, and can be differentiated twice on every device.
    """

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.units = units
        self.input = nn.Linear(inputs, 3 * units)
        self.state = nn.Linear(units, 3 * units)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(units**-0.5), units**-0.5)

    def forward(self, x: Tensor, steps: int) -> Tensor:
        """x (steps, B, inputs), or (1, B, inputs) for the same input at each step → states (steps, B, units)."""
        given = self.input(x)
        constant = [*given.split([2 * self.units, self.units], 2)]
        gates, candidates = (part.expand(steps, -1, -1).unbind(0) for part in constant)
        # Looked up once, because a normalised weight is computed at each look.
        weight, bias = self.state.weight, self.state.bias
        state = x.new_zeros(x.shape[1], self.units)
        states = []
        for gate, candidate in zip(gates, candidates, strict=True):
            own = F.linear(state, weight, bias)
            reset, update = (gate + own[:, : 2 * self.units]).sigmoid().chunk(2, 1)
            new = (candidate + reset * own[:, 2 * self.units :]).tanh()
            state = torch.lerp(new, state.to(new.dtype), update)
            states.append(state)
        return torch.stack(states)
