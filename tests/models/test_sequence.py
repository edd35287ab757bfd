"""Models of sequences: losses by hand, formulas of the networks, decoding, and what data they refuse."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from glf_fast import models
from glf_fast.errors import UserError
from glf_fast.grammar import EXPRESSIONS, Grammar, Parser, read
from glf_fast.models.regularizers import squared_weights
from glf_fast.models.sequence import GrammarModel, SequenceModel
from glf_fast.models.sequence_networks import GRU
from glf_fast.settings import check

VOCABULARY = (" ", *Grammar.of(EXPRESSIONS).characters)
TEXTS = ("x+x*(2)", "1/3+x", "sin(x)*exp(3)", "x", "2*x/x+1", "(x+1)*x", "3", "exp(x)")
SMALL = {"latent_dim": 3, "channels": [2], "kernels": [2], "dense": 8, "units": 6, "layers": 2}


def build(name: str, **settings: object) -> SequenceModel:
    about = {"vocabulary": list(VOCABULARY)} | ({} if name == "character-vae" else {"grammar": EXPRESSIONS})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return models.build(name, {"shape": [13], **SMALL, **about, **settings})


def tokens() -> torch.Tensor:
    return read(TEXTS, 13, VOCABULARY, 0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_hand(model: SequenceModel, scores: torch.Tensor, texts: tuple[str, ...]) -> float:
    """−log-likelihood of texts, as a mean, by Python's own numbers."""
    total = 0.0
    for row, text in zip(scores.tolist(), texts, strict=True):
        if isinstance(model, GrammarModel):
            grammar, rules = model.grammar, Parser.of(EXPRESSIONS).parse(text)
            for values, rule in zip(row, rules, strict=False):  # padding is certain
                same = [i for i, r in enumerate(grammar.rules) if r.left == grammar.rules[rule].left]
                total -= values[rule] - math.log(sum(math.exp(values[i]) for i in same))
        else:
            for values, character in zip(row, text.ljust(13), strict=True):
                total -= values[VOCABULARY.index(character)] - math.log(sum(map(math.exp, values)))
    return total / len(texts)


@pytest.mark.parametrize("name", ["grammar-vae", "character-vae"])
def test_the_variational_loss_is_the_sum_of_its_terms(name: str) -> None:
    model = build(name, beta=0.3, noise=0.5).double().eval()
    symbols = model.symbols(tokens())
    losses = model.losses(symbols, seeded())
    mean, log_variance = model.encoder(symbols).chunk(2, 1)
    noise = torch.randn(mean.shape, generator=seeded(), dtype=torch.float64)
    z = mean + 0.5 * (log_variance / 2).exp() * noise
    divergence = sum(
        0.5 * (m**2 + math.exp(v) - 1 - v)
        for m, v in zip(mean.flatten().tolist(), log_variance.flatten().tolist(), strict=True)
    )
    assert losses["divergence"].item() == pytest.approx(divergence / len(TEXTS))
    assert losses["reconstruction"].item() == pytest.approx(by_hand(model, model.decoder(z), TEXTS))
    torch.testing.assert_close(losses["loss"], losses["reconstruction"] + 0.3 * losses["divergence"])
    torch.testing.assert_close(model.encode(tokens()), mean)


@pytest.mark.parametrize("regularizer", ["none", "l2", "gp", "sn"])
def test_the_regularised_loss_is_the_sum_of_its_terms(regularizer: str) -> None:
    strength = {"strength": 0.7} if regularizer in ("l2", "gp") else {}
    model = build("grammar-rae", beta=0.3, regularizer=regularizer, **strength).double().eval()
    symbols = model.symbols(tokens())
    losses = model.losses(symbols, seeded())
    z = model.encode(tokens())
    scores = model.decoder(z)
    assert losses["reconstruction"].item() == pytest.approx(by_hand(model, scores, TEXTS))
    assert losses["codes"].item() == pytest.approx(sum(v * v for v in z.flatten().tolist()) / 2 / len(TEXTS))
    wanted = losses["reconstruction"] + 0.3 * losses["codes"]
    if regularizer == "l2":
        matrices = [p for name, p in model.decoder.named_parameters() if p.ndim > 1]
        assert len(matrices) == 2 + 2 * 2
        penalty = sum(p.detach().square().sum().item() for p in matrices)
        assert losses["penalty"].item() == pytest.approx(penalty) == squared_weights(model.decoder).item()
    if regularizer == "gp":
        v = torch.randn(scores.shape, generator=seeded(), dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(lambda z: (v * model.decoder(z)).sum(), z.detach())
        torch.testing.assert_close(losses["penalty"], jacobian.square().sum(1).mean())
    if regularizer == "sn":
        dense = [layer for layer in model.decoder.modules() if isinstance(layer, nn.Linear)]
        largest = torch.stack([torch.linalg.svdvals(layer.weight.detach())[0] for layer in dense])
        torch.testing.assert_close(largest, torch.ones_like(largest), atol=1e-2, rtol=0)
    assert ("penalty" in losses) == bool(strength)
    torch.testing.assert_close(losses["loss"], wanted + (0.7 * losses["penalty"] if strength else 0.0))


def test_recurrent_layers_have_torchs_formulas() -> None:
    ours, theirs = GRU(3, 5).double(), nn.GRU(3, 5).double()
    theirs.load_state_dict(
        {
            "weight_ih_l0": ours.input.weight,
            "weight_hh_l0": ours.state.weight,
            "bias_ih_l0": ours.input.bias,
            "bias_hh_l0": ours.state.bias,
        }
    )
    x = torch.randn(7, 4, 3, dtype=torch.float64, generator=seeded())
    torch.testing.assert_close(ours(x, 7), theirs(x)[0])
    torch.testing.assert_close(ours(x[:1], 7), theirs(x[:1].expand(7, -1, -1))[0])


def test_decoded_derivations_always_parse() -> None:
    """Also those of wild scores, at the limit of the rules; without the limit some do not end, and are empty."""
    model = build("grammar-rae", density={"kind": "none"})
    assert isinstance(model, GrammarModel)
    parses = Parser.of(EXPRESSIONS).parses
    scores = 3 * torch.randn(500, 15, 12, generator=seeded())
    written = model.text(model.written(scores))
    assert all(map(parses, written)) and len(set(written)) > 100
    longest = [len(Parser.of(EXPRESSIONS).parse(text)) for text in written]
    assert max(longest) >= 14
    loose = model.text(model.written(scores, ending=False))
    assert {parses(text) for text in loose} == {True, False}
    assert all(text in ("", other) for text, other in zip(loose, written, strict=True) if not text or parses(text))
    assert all(map(parses, model.text(model.sample(50, generator=seeded()))))
    assert model.sample(3, mode="unbounded", generator=seeded()).shape == model.sample(3).shape


def test_symbols_are_rules_and_back() -> None:
    model = build("grammar-vae")
    assert isinstance(model, GrammarModel)
    symbols = model.symbols(tokens())
    assert symbols.shape == (8, 15) and symbols[3].tolist() == [3, 7] + [11] * 13
    certain = 50.0 * model.grammar.one_hot(symbols)
    assert model.text(model.written(certain)) == list(TEXTS)
    torch.testing.assert_close(model.log_likelihoods(certain, symbols), torch.zeros(8), atol=1e-5, rtol=0)


def test_characters_end_at_the_first_padding() -> None:
    model = build("character-vae")
    scores = 9.0 * nn.functional.one_hot(read(["x+ (x)", "   x", "1*2"], 13, VOCABULARY, 0), len(VOCABULARY)).float()
    assert model.text(model.written(scores)) == ["x+", "", "1*2"]


def test_what_a_model_must_know_comes_from_the_data() -> None:
    data = SimpleNamespace(name="d", vocabulary=VOCABULARY, padding=0, grammar=EXPRESSIONS)
    for name in ("grammar-rae", "grammar-vae", "character-vae"):
        settings = models.kind(name).Settings().trained_on(data)
        check(settings)
        assert settings.vocabulary == VOCABULARY and settings.trained_on(data) == settings
        with pytest.raises(UserError, match=r"not that of d; leave model.vocabulary out"):
            replace(settings, vocabulary=("a", "b")).trained_on(data)
    bare = SimpleNamespace(**{**vars(data), "grammar": ""})
    assert models.kind("character-vae").Settings().trained_on(bare).vocabulary == VOCABULARY
    with pytest.raises(
        UserError, match=r"d has no grammar, which model 'grammar-vae' needs; put the sequences into a .txt"
    ):
        models.kind("grammar-vae").Settings().trained_on(bare)
    with pytest.raises(UserError, match=r"kernels = .2. must be as many numbers as channels"):
        check(replace(models.kind("grammar-vae").Settings(), kernels=(2,)))


@pytest.mark.parametrize(
    ("settings", "text", "message"),
    [
        ({}, "x+", "'x.' does not parse"),
        ({"rules": 5}, "x+x*(2)", "has a derivation of 8 rules; use --model.rules 8 or more"),
        ({"rules": 1}, "x", "1 rules are too few for a sentence"),
        ({"kernels": [20]}, "x", "sequences of 15 symbols are too short for kernels"),
    ],
)
def test_sequences_that_do_not_fit_are_named(settings: dict, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        build("grammar-rae", **settings).encode(read([text], 13, VOCABULARY, 0))
    assert "\n" not in str(error.value)
