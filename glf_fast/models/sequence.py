"""Base classes of the models of token sequences: characters, and derivations of a grammar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from glf_fast.errors import UserError
from glf_fast.grammar import Grammar, Parser, decode, read, write
from glf_fast.models.density import DensitySettings
from glf_fast.models.latent import ExPostModel
from glf_fast.models.model import ModelSettings, Stage
from glf_fast.models.sequence_networks import SequenceDecoder, SequenceEncoder
from glf_fast.models.variational import draw, normal_divergence
from glf_fast.settings import NOT_NEGATIVE, POSITIVE, Rule

__all__ = [
    "GrammarModel",
    "GrammarSettings",
    "SequenceModel",
    "SequenceSettings",
    "SequenceVAE",
    "SequenceVAESettings",
]

S = TypeVar("S", bound="SequenceSettings")


@dataclass(frozen=True)
class SequenceSettings(ModelSettings):
    """An autoencoder of token sequences; the density of its codes is a table of its own."""

    latent_dim: int = 25
    """Length of a code, the dimension of the latent space."""
    channels: tuple[int, ...] = (2, 3, 4)
    """Channels of the encoder's convolutions."""
    kernels: tuple[int, ...] = (2, 3, 4)
    """Lengths of the encoder's convolutions."""
    dense: int = 100
    """Units of the encoder's dense layer."""
    units: int = 100
    """Units of each of the decoder's recurrent layers."""
    layers: int = 3
    """Recurrent layers of the decoder."""
    vocabulary: tuple[str, ...] = ()
    """The tokens; by default those of the training set."""
    padding: int = 0
    """Index of the token that fills up short sequences; the data set decides on it together with the vocabulary."""
    density: DensitySettings = DensitySettings()  # noqa: RUF009 - frozen

    RULES: ClassVar[Mapping[str, Rule]] = {
        **dict.fromkeys(("latent_dim", "dense", "units", "layers"), POSITIVE),
        **dict.fromkeys(
            ("channels", "kernels"), (lambda value: bool(value) and min(value) > 0, "one or more positive numbers")
        ),
        "padding": NOT_NEGATIVE,
    }

    def effective(self) -> dict[str, Any]:
        """The fields that have an effect, by name; the training set has the vocabulary, unless it is set."""
        without = ("vocabulary", "padding") if not self.vocabulary else ()
        return {name: value for name, value in super().effective().items() if name not in without}

    def choice(self, name: str) -> str:
        """The field that decides whether the field `name` has an effect."""
        return "vocabulary" if name == "padding" else super().choice(name)

    def mistake(self) -> str:
        """A message unless each convolution has channels and a length."""
        if len(self.channels) == len(self.kernels):
            return ""
        return f"kernels = {list(self.kernels)} must be as many numbers as channels = {list(self.channels)}"

    def trained_on(self: S, train: Any) -> S:
        """These settings with vocabulary and padding of the training set.

        Raises:
            UserError: the settings have another vocabulary.
        """
        if self.vocabulary not in ((), train.vocabulary):
            raise UserError(f"model.vocabulary is not that of {train.name}; leave model.vocabulary out")
        return replace(self, vocabulary=train.vocabulary, padding=train.padding)

    def summary(self) -> str:
        """The settings that matter most, in a few words for the report."""
        return f"{self.latent_dim} latent dimensions"


class SequenceModel(ExPostModel):
    """A model of token sequences with an encoder E to codes, a decoder D and a distribution of codes.

    Encoder and decoder see sequences of symbols: in this class the tokens themselves, in `GrammarModel` the rules of a
    derivation. D(z) gives scores of all symbols at all places at once, and the symbols at different places are independent
    given z. A decoded sequence has the most probable symbol at each place.

    Sequences are int64. The losses take symbols, into which the first stage turns the training set once.

    Args:
        shape: (L,) of the sequences.    settings: see `SequenceSettings`.
        numbers: numbers that E gives for each dimension of a code; 2 for a mean and a log-variance.
    """

    takes: ClassVar[frozenset[str]] = frozenset({"tokens"})
    settings: SequenceSettings  # type: ignore[assignment]
    encoder: SequenceEncoder
    decoder: SequenceDecoder

    def networks(self, numbers: int) -> tuple[nn.Module, nn.Module]:
        """Encoder and decoder for `symbol_shape`."""
        settings, (length, symbols) = self.settings, self.symbol_shape
        outputs = numbers * settings.latent_dim
        return (
            SequenceEncoder(length, symbols, outputs, settings.channels, settings.kernels, settings.dense),
            SequenceDecoder(length, symbols, settings.latent_dim, settings.units, settings.layers),
        )

    # -- symbols: a subclass may replace these ------------------------------------------------------------------------------

    @property
    def symbol_shape(self) -> tuple[int, int]:
        """Length of a sequence of symbols, and the number of different symbols."""
        if len(self.shape) != 1 or not self.settings.vocabulary:
            raise ValueError(f"sequences must have a length and a vocabulary; got shape {self.shape}")
        return self.shape[0], len(self.settings.vocabulary)

    def symbols(self, x: Tensor) -> Tensor:
        """The symbols of sequences x (B, L), int64."""
        self._check_batch("x", x)
        return x

    def log_likelihoods(self, scores: Tensor, symbols: Tensor) -> Tensor:
        """log p(symbols) (B,) in nats, for scores (B, *symbol_shape)."""
        return _log_likelihoods(scores, symbols)

    def written(self, scores: Tensor) -> Tensor:
        """The sequences, int64, with the most probable symbols; nothing stands behind the first padding."""
        tokens = scores.argmax(2)
        ended = (tokens == self.settings.padding).cumsum(1) > 0
        return tokens.masked_fill(ended, self.settings.padding)

    # -- training -----------------------------------------------------------------------------------------------------------

    def stages(self) -> tuple[Stage, ...]:
        """Training by the phases on symbols; then, if there is a density, its fit to the codes."""
        first, *others = super().stages()
        return (replace(first, inputs=self.symbols), *others)

    # -- use ----------------------------------------------------------------------------------------------------------------

    def encode(self, x: Tensor) -> Tensor:
        """Sequences x (B, L) → codes z (B, latent_dim)."""
        return self.encoder(self.symbols(x))

    def decode(self, z: Tensor) -> Tensor:
        """Codes z (B, latent_dim) → sequences, int64 (B, L); of `GrammarModel` they may be longer."""
        return self.written(self.decoder(z))

    def text(self, tokens: Tensor) -> list[str]:
        """Sequences (n, …) of tokens in writing."""
        return write(tokens, self.settings.vocabulary, self.settings.padding)

    def _check_batch(self, name: str, x: Tensor) -> None:
        if not isinstance(x, Tensor) or x.dtype != torch.int64:
            raise TypeError(
                f"{name} must be int64 tokens; got {x.dtype if isinstance(x, Tensor) else type(x).__name__}"
            )
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"{name} must have shape (batch, {self.shape[0]}); got {tuple(x.shape)}")


@dataclass(frozen=True)
class GrammarSettings(SequenceSettings):
    """An autoencoder of the sentences of a grammar."""

    rules: int = 15
    """Rules of a derivation at most; longer sentences are errors."""
    grammar: str = ""
    """Text of the grammar; by default that of the training set."""

    RULES: ClassVar[Mapping[str, Rule]] = {**SequenceSettings.RULES, "rules": POSITIVE}

    def effective(self) -> dict[str, Any]:
        """The fields that have an effect, by name; the training set has the grammar, unless it is set."""
        return {name: value for name, value in super().effective().items() if name != "grammar" or value}

    def trained_on(self, train: Any) -> GrammarSettings:
        """These settings with the vocabulary and the grammar of the training set.

        Raises:
            UserError: the data set has no grammar, or the settings have another one.
        """
        if not train.grammar:
            raise UserError(
                f"{train.name} has no grammar, which model {self.name!r} needs; put the sequences into a .txt file, "
                "one a line, and their grammar into a .grammar file of the same name"
            )
        if self.grammar not in ("", train.grammar):
            raise UserError(f"model.grammar is not that of {train.name}; leave model.grammar out")
        return replace(super().trained_on(train), grammar=train.grammar)


class GrammarModel(SequenceModel):
    """A model of the sentences of a grammar, whose symbols are the rules of leftmost derivations (arXiv:1703.01925).

    At each step of a derivation only the rules of the nonterminal on top of the stack have a probability. A decoded derivation
    also leaves out the rules after which it could not end in time, so that every decoded sequence is a sentence. In sampling
    mode "unbounded" it does not, as in the paper: derivations that do not end are written as empty sequences.
    """

    sampling_modes: ClassVar[Mapping[str, str]] = {
        **ExPostModel.sampling_modes,
        "unbounded": "derivations that do not end in time are empty sequences, as in the paper",
    }
    settings: GrammarSettings
    siblings: Tensor

    def __init__(self, shape: Sequence[int], settings: GrammarSettings) -> None:
        super().__init__(shape, settings)  # type: ignore[arg-type]
        # The rules of the same nonterminal as each rule, bool (rules + 1, rules + 1).
        self.register_buffer("siblings", self.grammar.masks[self.grammar.left], persistent=False)

    @property
    def grammar(self) -> Grammar:
        """The grammar."""
        return Grammar.of(self.settings.grammar)

    @property
    def symbol_shape(self) -> tuple[int, int]:
        """The number of rules of a derivation, and of the grammar with the padding rule."""
        if len(self.shape) != 1 or self.settings.rules < int(self.grammar.least[0]):
            raise ValueError(f"{self.settings.rules} rules are too few for a sentence, or {self.shape} is not (L,)")
        return self.settings.rules, self.grammar.padding + 1

    # torch.compile would follow the parser through every sentence.
    @torch._disable_dynamo
    def symbols(self, x: Tensor) -> Tensor:
        """The derivations (B, rules) of sequences x (B, L).

        Raises:
            UserError: a sequence that is no sentence of the grammar, or has a longer derivation.
        """
        self._check_batch("x", x)
        parser, most, padding = Parser.of(self.settings.grammar), self.settings.rules, self.grammar.padding
        rows = []
        for text in self.text(x):
            rules = parser.parse(text)
            if len(rules) > most:
                raise UserError(
                    f"{text!r} has a derivation of {len(rules)} rules; use --model.rules {len(rules)} or more"
                )
            rows.append(rules + [padding] * (most - len(rules)))
        return torch.tensor(rows, dtype=torch.int64, device=x.device).view(len(x), most)

    def log_likelihoods(self, scores: Tensor, symbols: Tensor) -> Tensor:
        """log p(symbols) (B,), where only the rules of the true nonterminals have a probability."""
        return _log_likelihoods(scores.masked_fill(~self.siblings[symbols], -1e9), symbols)

    def written(self, scores: Tensor, *, ending: bool = True) -> Tensor:
        """The sentences with the most probable derivations, int64 (B, …), as long as the longest one may be."""
        derivations, ended = decode(self.grammar, scores, ending=ending)
        texts = []
        for rules, whole in zip(derivations.tolist(), ended.tolist(), strict=True):
            used = [rule for rule in rules if rule != self.grammar.padding]
            texts.append("".join(self.grammar.derive(used)) if whole else "")
        longest = max(sum(map(len, rule.terminals)) for rule in self.grammar.rules)
        length = max(self.shape[0], self.settings.rules * longest)
        return read(texts, length, self.settings.vocabulary, self.settings.padding).to(scores.device)

    def sample(
        self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None, mode: str = ""
    ) -> Tensor:
        """n sequences (n, …), see `GenerativeModel.sample`."""
        if mode != "unbounded":
            return super().sample(n, temperature=temperature, generator=generator, mode=mode)
        with self.evaluating():
            z = self.sample_codes(n, temperature=temperature, generator=generator)
            return self.written(self.decoder(z), ending=False)


@dataclass(frozen=True)
class SequenceVAESettings(SequenceSettings):
    """A variational autoencoder of token sequences."""

    beta: float = 1.0
    """Weight of the divergence between posterior and prior."""
    noise: float = 1.0
    """Factor of the posterior's noise in training: 1 in the paper, 0.01 in the released code."""

    RULES: ClassVar[Mapping[str, Rule]] = {**SequenceSettings.RULES, "beta": NOT_NEGATIVE, "noise": NOT_NEGATIVE}

    def summary(self) -> str:
        """The settings that matter most, in a few words for the report."""
        return f"{super().summary()}, β = {self.beta:g}, noise {self.noise:g}"


class SequenceVAE(SequenceModel):
    """A variational autoencoder of token sequences. With symbols s of a sequence its loss is, as a mean over the batch,

        −log p(s|z) + β·KL(q(z|s) ‖ N(0, I)),        q(z|s) = N(μ, σ²),  z = μ + c·σ·ε,  ε ~ N(0, I),

    with c = 1 in the paper. In the released code (github.com/mkusner/grammarVAE) c is 0.01, and the loss is R·(mean binary
    cross-entropy of the R × K one-hot numbers) + (mean of the KL's D terms). Its loss, multiplied by K, has β = K/D here, up
    to the cross-entropy, which here is that of K classes.
    """

    settings: SequenceVAESettings

    def __init__(self, shape: Sequence[int], settings: SequenceVAESettings) -> None:
        super().__init__(shape, settings, numbers=2)  # type: ignore[arg-type]

    def losses(self, symbols: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Scalars of a batch of symbols (B, R): the loss, and its terms per sequence in nats."""
        h = self.encoder(symbols)
        mean, _ = h.chunk(2, 1)
        z = mean + self.settings.noise * (draw(h, generator)[0] - mean)
        reconstruction = -self.log_likelihoods(self.decoder(z), symbols).mean()
        divergence = normal_divergence(h).mean()
        return {
            "loss": reconstruction + self.settings.beta * divergence,
            "reconstruction": reconstruction,
            "divergence": divergence,
        }

    def encode(self, x: Tensor) -> Tensor:
        """Mean codes μ (B, latent_dim) of sequences x (B, L)."""
        return super().encode(x).chunk(2, 1)[0]


def _log_likelihoods(scores: Tensor, symbols: Tensor) -> Tensor:
    with torch.autocast(scores.device.type, enabled=False):
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return scores.log_softmax(2).gather(2, symbols[..., None])[..., 0].sum(1)
