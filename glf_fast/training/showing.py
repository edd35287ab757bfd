"""Pictures and scores of a run, by the kind of its data: images or token sequences. Runs on other data have neither."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from glf_fast.data import Dataset, ImageDataset, TokenDataset
from glf_fast.metrics import USUAL, subset
from glf_fast.models import GenerativeModel, Reconstructs, Writes
from glf_fast.training import sequence_scoring
from glf_fast.training.config import ScoreConfig
from glf_fast.training.pictures import draw_pictures
from glf_fast.training.scoring import evaluate, has_scores, load_extractors, table

__all__ = ["Showing", "showing"]


class Showing(Protocol):
    """Pictures and scores of models of one kind of data.

    Attributes:
        items: the usual word for items of the data.
    """

    items: str

    def pictures(self, model: GenerativeModel, seed: int) -> Mapping[str, Tensor | str]:
        """A picture of each kind that the model can make, "samples" first: uint8 (C, H, W), or text."""
        ...

    def evaluate(
        self, model: GenerativeModel, seed: int, about: dict[str, Any] | None = None, *, final: bool
    ) -> list[dict[str, Any]]:
        """Scores, JSON-ready: all of them if `final`, else the first one."""
        ...

    def complete(self, scores: list[dict[str, Any]]) -> bool:
        """Whether final scores have all that the settings ask for."""
        ...

    def summary(self, score: dict[str, Any]) -> tuple[dict[str, Any], dict[str, float], str]:
        """A score for the log, with "metric", "value" (lower is better) and "reconstructions"; its curves; and its text."""
        ...

    def table(self, scores: list[dict[str, Any]]) -> str:
        """Scores as text."""
        ...


def showing(train: Dataset, test: Dataset, config: ScoreConfig, device: torch.device) -> Showing | None:
    """Pictures and scores for models of these data; None if there is nothing to show.

    Raises:
        UserError: a feature network whose weights are missing.
    """
    if isinstance(train, ImageDataset) and isinstance(test, ImageDataset):
        return _Images(train, test, config, device)
    if isinstance(train, TokenDataset) and isinstance(test, TokenDataset):
        return _Sequences(train, test, config)
    return None


class _Images:
    items = "images"

    def __init__(self, train: ImageDataset, test: ImageDataset, config: ScoreConfig, device: torch.device) -> None:
        self.train, self.test, self.config, self.device = train, test, config, device
        self.extractors = load_extractors(config.extractors, device)

    def pictures(self, model: GenerativeModel, seed: int) -> Mapping[str, Tensor | str]:
        return draw_pictures(model, self.test.images.to(self.device), seed)

    def evaluate(
        self, model: GenerativeModel, seed: int, about: dict[str, Any] | None = None, *, final: bool
    ) -> list[dict[str, Any]]:
        extractors = self.extractors if final else self.extractors[:1]
        scores = self.config.scores if final else USUAL
        n = self.config.samples
        return evaluate(model, self.train, self.test, extractors, n=n, seed=seed, about=about, scores=scores)

    def complete(self, scores: list[dict[str, Any]]) -> bool:
        return has_scores(scores, self.config.scores)

    def summary(self, score: dict[str, Any]) -> tuple[dict[str, Any], dict[str, float], str]:
        samples, rebuilt = score["samples"], score["reconstructions"]
        logged = {k: samples[k] for k in ("metric", "value")}
        logged["reconstructions"] = rebuilt["value"] if rebuilt else None
        curves = {f"{samples['metric']} of samples": samples["value"]}
        line = f"{samples['metric']} {samples['value']:.2f}"
        if rebuilt:
            curves[f"{samples['metric']} of reconstructions"] = rebuilt["value"]
            line += f" (reconstructions {rebuilt['value']:.2f})"
        if (density := score["likelihood"]) and density["value"] is not None:
            curves[density["metric"]] = density["value"]
            line += f", {density['metric']} {density['value']:.3f}"
        return logged, curves, line

    def table(self, scores: list[dict[str, Any]]) -> str:
        return table(scores)


class _Sequences:
    items = "sequences"

    def __init__(self, train: TokenDataset, test: TokenDataset, config: ScoreConfig) -> None:
        self.train, self.test, self.config = train, test, config

    def pictures(self, model: GenerativeModel, seed: int) -> Mapping[str, Tensor | str]:
        texts = sequence_scoring.draw_texts(model, 40, seed=seed)
        pictures = {"samples": "\n".join(texts)}
        if isinstance(model, Reconstructs) and isinstance(model, Writes):
            real = subset(self.test.items, 20)
            rebuilt = model.text(model.reconstruct(real.to(next(model.parameters()).device)).cpu())
            pairs = zip(model.text(real), rebuilt, strict=True)
            pictures["reconstructions"] = "\n".join(f"{a}\n  {b}" for a, b in pairs)
        if ways := sequence_scoring.interpolations(model, self.test, 5):
            pictures["interpolations"] = "\n\n".join("\n".join(way) for way in ways)
        return pictures

    def evaluate(
        self, model: GenerativeModel, seed: int, about: dict[str, Any] | None = None, *, final: bool
    ) -> list[dict[str, Any]]:
        searches = self.config.searches if final else 0
        return sequence_scoring.evaluate_sequences(
            model, self.train, self.test, n=self.config.samples, searches=searches, seed=seed, about=about
        )

    def complete(self, scores: list[dict[str, Any]]) -> bool:
        return True

    def summary(self, score: dict[str, Any]) -> tuple[dict[str, Any], dict[str, float], str]:
        found = score["sequences"]
        right, valid = found["reconstructed"], found["samples"]["valid"]
        # Without reconstructions, samples that are not valid are what can be counted.
        name = "wrong samples" if right is None else "wrong reconstructions"
        value = 1 - (valid if right is None else right)
        curves = {name: value, "valid samples": valid}
        return (
            {"metric": name, "value": value, "reconstructions": None},
            curves,
            f"{name} {value:.3f}, valid {valid:.3f}",
        )

    def table(self, scores: list[dict[str, Any]]) -> str:
        return sequence_scoring.table(scores)
