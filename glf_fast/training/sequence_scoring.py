"""Scores of a model of token sequences: of its samples, its reconstructions, and of searches in its latent space."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glf_fast import metrics, seeds
from glf_fast.data import TokenDataset
from glf_fast.distributed import by_main
from glf_fast.errors import UserError
from glf_fast.grammar import Parser, write
from glf_fast.metrics.objectives import OBJECTIVES, Objective
from glf_fast.metrics.search import check_search, search
from glf_fast.metrics.sequences import score_texts
from glf_fast.models import DrawsCodes, GenerativeModel, Interpolates, Reconstructs, Writes

__all__ = ["NAME", "check", "draw_texts", "draw_tokens", "evaluate_sequences", "interpolations", "lines", "table"]

# Takes the place of a feature network in the settings of a score.
NAME = "sequences"
_CHUNK = 500
_OTHER_MODES = 1000  # samples for the scores of the other sampling modes
KNOWN = 500  # training sequences with whose codes a search begins
_ROUNDS, _BATCH = 5, 50


def draw_tokens(
    model: GenerativeModel, n: int, *, seed: int, temperature: float = 1.0, mode: str = ""
) -> Iterator[Tensor]:
    """n sampled sequences in parts, int64 (part, …) on the CPU; sequence i depends on (seed, i) alone, not on n.

    Raises:
        UserError: n < 1, a negative temperature, or a sampling mode that the model does not have.
    """
    if n < 1:
        raise UserError(f"n = {n} sequences cannot be drawn; n must be 1 or more")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature = {temperature} must be 0 or more")
    model.check_mode(mode)
    device = next(model.parameters()).device
    for start in range(0, n, _CHUNK):
        noise = seeds.generator(seed, "sample", start // _CHUNK, device=device)
        yield model.sample(_CHUNK, temperature=temperature, generator=noise, mode=mode)[: n - start].cpu()


def draw_texts(model: GenerativeModel, n: int, *, seed: int, temperature: float = 1.0, mode: str = "") -> list[str]:
    """The sequences of `draw_tokens` as text."""
    assert isinstance(model, Writes)
    parts = draw_tokens(model, n, seed=seed, temperature=temperature, mode=mode)
    return [text for part in parts for text in model.text(part)]


def interpolations(model: GenerativeModel, test: TokenDataset, count: int, steps: int = 8) -> list[list[str]]:
    """The texts on the ways between `count` pairs of test sequences, each text once; [] if the model cannot interpolate."""
    ends = metrics.subset(test.items, 2 * count).to(next(model.parameters()).device)
    if not isinstance(model, Interpolates) or not isinstance(model, Writes) or len(ends) < 2:
        return []
    ways = model.interpolate(ends[0::2][: len(ends) // 2], ends[1::2], steps)
    return [list(dict.fromkeys(model.text(way.cpu()))) for way in ways]


def evaluate_sequences(
    model: GenerativeModel,
    train: TokenDataset,
    test: TokenDataset,
    *,
    n: int,
    searches: int = 0,
    seed: int = 0,
    temperature: float = 1.0,
    mode: str = "",
    about: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Score n samples, the reconstructions of up to n test sequences, and searches in the latent space.

    Of several processes (`distributed`) the first one does it, and all get the scores.

    Args:
        searches: Bayesian optimisations with the seeds 0 … searches − 1, if the data have an objective.
        mode: one of the model's sampling modes, or "". Without one, all others are scored, too.
        about: description of the checkpoint, to be recorded.

    Returns:
        A list with {"settings", "checkpoint": about, "sequences": …}, JSON-ready; "sequences" has

            samples: result of `metrics.sequences.score_texts`.    modes: the same for other sampling modes, by name.
            texts: the first 20 samples.    objective: title of the objective, or "".
            reconstructed: share of the test sequences that are reconstructed without a mistake, or None.
            interpolations: see `interpolations`.    search: result of the searches, or None.

    Raises:
        UserError: something that the objective or a search needs is not installed.
    """
    return by_main(_evaluated)(
        model,
        train,
        test,
        searches,
        {"n": n, "seed": seed, "temperature": temperature, "mode": mode},
        about or {},
    )


def _evaluated(
    model: GenerativeModel,
    train: TokenDataset,
    test: TokenDataset,
    searches: int,
    settings: dict[str, Any],
    about: dict[str, Any],
) -> list[dict[str, Any]]:
    objective = _objective(train)
    if searches and objective:
        check_search()
    known = frozenset(write(train.items, train.vocabulary, train.padding))
    valid = _validity(train)
    value = objective.value if objective else None

    def scored(texts: Sequence[str]) -> dict[str, Any]:
        return score_texts(texts, known, valid, value)

    options = {"seed": settings["seed"], "temperature": settings["temperature"]}
    texts = draw_texts(model, settings["n"], mode=settings["mode"], **options)
    others = {}
    for other in model.sampling_modes if not settings["mode"] else ():
        drawn = draw_texts(model, min(settings["n"], _OTHER_MODES), mode=other, **options)
        if drawn != texts[: len(drawn)]:  # of a mode that changes nothing with these settings
            others[other] = scored(drawn)
    return [
        {
            "settings": {"extractor": NAME, **settings},
            "checkpoint": about,
            "sequences": {
                "samples": scored(texts),
                "modes": others,
                "texts": texts[:20],
                "objective": objective.title if objective else "",
                "reconstructed": _reconstructed(model, test, settings["n"]),
                "interpolations": interpolations(model, test, 3),
                "search": _searched(model, train, objective, valid, searches) if objective and searches else None,
            },
        }
    ]


def _objective(dataset: TokenDataset) -> Objective | None:
    """The objective of a data set, or None; raises UserError if it needs something that is not installed."""
    objective = OBJECTIVES[dataset.objective] if dataset.objective else None
    if objective:
        objective.check()
    return objective


def _validity(dataset: TokenDataset) -> Callable[[str], bool]:
    """Whether a text is a sentence of the data set's grammar; without a grammar, whether it is not empty."""
    return Parser.of(dataset.grammar).parses if dataset.grammar else bool


def _reconstructed(model: GenerativeModel, test: TokenDataset, n: int) -> float | None:
    if not isinstance(model, Reconstructs) or not isinstance(model, Writes):
        return None
    device, items, right = next(model.parameters()).device, metrics.subset(test.items, n), 0
    for batch in items.split(_CHUNK):
        pairs = zip(model.text(model.reconstruct(batch.to(device)).cpu()), model.text(batch), strict=True)
        right += sum(a == b for a, b in pairs)
    return right / len(items)


# -- searches -------------------------------------------------------------------------------------------------------------


class _Judge:
    """The objective as a function of codes: the value of the text to which a code is decoded.

    A text without a value counts as the worst one seen so far.

    Attributes:
        seen: texts and values of all codes that were judged, in their order.
    """

    def __init__(self, model: GenerativeModel, objective: Objective, valid: Callable[[str], bool]) -> None:
        assert isinstance(model, Writes) and isinstance(model, DrawsCodes)
        self.model, self.objective, self.valid = model, objective, valid
        self.seen: list[tuple[str, float | None]] = []

    def __call__(self, z: np.ndarray) -> np.ndarray:
        codes = torch.from_numpy(z).to(next(self.model.parameters()))
        with self.model.evaluating():
            texts = [text for part in codes.split(_CHUNK) for text in self.model.text(self.model.decode(part).cpu())]
        values = [self.objective.value(text) if self.valid(text) else None for text in texts]
        self.seen += zip(texts, values, strict=True)
        worst = max((value for _, value in self.seen if value is not None), default=0.0)
        return np.array([worst if value is None else value for value in values])


def _searched(
    model: GenerativeModel, train: TokenDataset, objective: Objective, valid: Callable[[str], bool], count: int
) -> dict[str, Any] | None:
    """Results of `count` Bayesian optimisations, as means and deviations over their seeds; None for a model without codes.

    Each begins with the codes of training sequences that its seed chooses. These codes have the values of what they are
    decoded to, as all others: a model that reconstructs few sequences would otherwise begin with values of other codes.
    """
    if not isinstance(model, DrawsCodes) or not isinstance(model, Writes):
        return None
    device, found = next(model.parameters()).device, dict[str, float]()
    shares, means, starts, ends = list[float](), list[float](), list[float](), list[float]()
    for seed in range(count):
        print(f"search {seed + 1} of {count} in the latent space", file=sys.stderr)
        order = torch.randperm(len(train.items), generator=seeds.generator(seed, "search", "start"))
        with model.evaluating():
            codes = model.encode(train.items[order[:KNOWN]].to(device)).cpu().double().numpy()

        def draw(number: int, n: int, seed: int = seed) -> np.ndarray:
            noise = seeds.generator(seed, "search", number, device=device)
            with model.evaluating():
                return model.sample_codes(n, generator=noise).cpu().double().numpy()

        judge = _Judge(model, objective, valid)
        values = judge(codes)
        search(codes, values, judge, draw, rounds=_ROUNDS, batch=_BATCH, seed=seed)
        tried = judge.seen[len(codes) :]
        good = [value for _, value in tried if value is not None]
        shares.append(len(good) / len(tried))
        means += [statistics.fmean(good)] if good else []
        ends += _least(tried)
        starts += _least(judge.seen[: len(codes)])
        found.update((text, value) for text, value in tried if value is not None)
    return {
        "seeds": count,
        "rounds": _ROUNDS,
        "batch": _BATCH,
        "known": min(KNOWN, len(train.items)),
        "valid": _over_seeds(shares),
        "mean": _over_seeds(means),
        "best_known": _over_seeds(starts),
        "best_tried": _over_seeds(ends),
        "best": [[value, text] for value, text in sorted((value, text) for text, value in found.items())[:3]],
    }


def _least(judged: Sequence[tuple[str, float | None]]) -> list[float]:
    """The least value, or nothing if no text has one."""
    return sorted(value for _, value in judged if value is not None)[:1]


def _over_seeds(numbers: list[float]) -> list[float | None]:
    """Mean and standard deviation; None where there are too few numbers."""
    return [
        statistics.fmean(numbers) if numbers else None,
        statistics.stdev(numbers) if len(numbers) > 1 else None,
    ]


# -- words ----------------------------------------------------------------------------------------------------------------


def lines(score: dict[str, Any]) -> list[str]:
    """A score of sequences as lines of text."""
    found, settings = score["sequences"], score["settings"]
    told = [f"{settings['n']:,} samples: {_samples(found['samples'])}"]
    told += [f"mode {mode}: {_samples(other)}" for mode, other in found["modes"].items()]
    if found["reconstructed"] is not None:
        told.append(f"test sequences reconstructed without a mistake: {found['reconstructed']:.3f}")
    if found["objective"]:
        told.append(f"objective, lower is better: {found['objective']}")
    told += [f"best sample: {value:.4f}  {text}" for value, text in found["samples"]["best"][:1]]
    if search := found["search"]:
        told.append(
            f"{search['seeds']} searches of {search['rounds']} × {search['batch']} points: valid {_pair(search['valid'])}, "
            f"mean {_pair(search['mean'])}"
        )
        told += [f"found: {value:.4f}  {text}" for value, text in search["best"]]
    return told


def _samples(scores: dict[str, Any]) -> str:
    text = f"valid {scores['valid']:.3f}, unique {scores['unique']:.3f}, novel {scores['novel']:.3f}"
    return text if scores["mean"] is None else f"{text}, mean objective {scores['mean']:.3f}"


def _pair(numbers: Sequence[float | None]) -> str:
    mean, deviation = numbers
    if mean is None:
        return "none"
    return f"{mean:.3f}" + (f" ± {deviation:.3f}" if deviation is not None else "")


def table(scores: Sequence[dict[str, Any]]) -> str:
    """Scores of sequences as text."""
    return "\n".join(line for score in scores for line in lines(score))


def check(score: dict[str, Any]) -> None:
    """Look up whatever `lines` does; raises TypeError, KeyError or ValueError where something is missing."""
    lines(score)
    _ = "".join([*score["sequences"]["texts"], score["settings"]["mode"], score["checkpoint"]["name"]])
    _ = ["".join(way) for way in score["sequences"]["interpolations"]]
    _ = score["checkpoint"]["epoch"] + score["settings"]["temperature"] + score["settings"]["seed"]
