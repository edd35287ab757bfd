"""Model card of a run, for the Hugging Face Hub: what the model is, its pictures, and its scores with their protocols."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from glf_fast import models
from glf_fast.training import runs, sequence_scoring
from glf_fast.training.config import Config
from glf_fast.training.pictures import latest_picture

__all__ = ["PICTURES", "pictures", "protocol_line", "text"]

# Kinds of pictures on the card, in order: folders of a run.
PICTURES = ("samples", "reconstructions", "interpolations")


def text(run: Path, images: int, repository: str, pictures: Mapping[str, str]) -> str:
    """The card in Markdown, with the metadata that the Hub reads above it.

    Args:
        run: folder of the run.
        images: number of images after which the checkpoint was written; scores of other checkpoints are left out.
        repository: "owner/name" of the model on the Hub.
        pictures: names of picture files beside the card, by their kind in PICTURES.
    """
    config = runs.read_config(run)
    scores = [score for score in runs.read_scores(run) if score["checkpoint"]["images"] == images]
    kind = models.kind(config.model.name)
    name = repository.partition("/")[2] or repository
    about = ModelCardData(
        library_name="glf_fast",
        tags=["generative-model", config.model.name],
        model_name=name,
        eval_results=[_result(score, config) for score in scores if "samples" in score] or None,
    )
    parts = [
        f"---\n{about.to_yaml()}\n---\n\n# {name}\n",
        f"{', '.join(filter(None, (kind.words.title, config.model.summary())))}, trained on {config.data.source} with "
        f"glf_fast {version('glf_fast')}.\n",
        *(f"![{title}]({pictures[title]})\n" for title in PICTURES if title in pictures),
        f"""## Use

```python
from glf_fast import models

model = models.kind("{config.model.name}").from_pretrained("{repository}")
samples = model.sample(16, temperature=0.8)
```
""",
        f"## Scores\n\n{_scores(scores)}",
        f"## Settings\n\n```toml\n{(run / 'config.toml').read_text(encoding='utf-8').strip()}\n```\n",
        "## Protocols\n\n```json\n"
        + json.dumps(
            [score["samples"]["protocol"] for score in scores if "samples" in score], indent=2, ensure_ascii=False
        )
        + "\n```\n",
    ]
    return "\n".join(parts)


def _result(score: Mapping[str, Any], config: Config) -> EvalResult:
    samples = score["samples"]
    return EvalResult(
        task_type="unconditional-image-generation",
        dataset_type=config.data.source,
        dataset_name=samples["protocol"]["reference"]["name"],
        dataset_split=samples["protocol"]["reference"]["split"],
        metric_type="frechet-distance",
        metric_name=samples["metric"],
        metric_value=samples["value"],
    )


def _scores(scores: Sequence[Mapping[str, Any]]) -> str:
    """The scores as a table, each with its protocol in a line; those of sequences in lines."""
    told = [line for score in scores if "sequences" in score for line in sequence_scoring.lines(dict(score))]
    images = [score for score in scores if "samples" in score]
    rows = ["| | value | 95 % interval | real training images | protocol |", "|---|---|---|---|---|"]
    for score in images:
        samples, rebuilt = score["samples"], score["reconstructions"]
        interval = "{:.2f} … {:.2f}".format(*samples["interval"]) if samples["interval"] else "–"
        floor, line = f"{samples['floors']['train/test']:.2f}", protocol_line(score)
        rows.append(f"| {samples['metric']} of samples | {samples['value']:.2f} | {interval} | {floor} | {line} |")
        if rebuilt:
            rows.append(f"| {rebuilt['metric']} of reconstructions | {rebuilt['value']:.2f} | | {floor} | the same |")
    text = "\n".join([*(rows if images else []), *told])
    return (
        f"{text}\n\nLower distances are better. Two scores can be compared only if their protocols agree.\n"
        if text
        else ("This model has no scores yet.\n")
    )


def protocol_line(score: Mapping[str, Any]) -> str:
    """The protocol of a Fréchet distance in a line."""
    protocol, settings, checkpoint = score["samples"]["protocol"], score["settings"], score["checkpoint"]
    extractor, reference = protocol["extractor"], protocol["reference"]
    parts = [
        f"{protocol['n']:,} samples, {reference['n']:,} images of {reference['name']}:{reference['split']}",
        f"{extractor['name']} with weights {extractor['weights_sha256'][:12]}",
        f"resized {extractor['resize']}",
        protocol["quantisation"],
        f"temperature {settings['temperature']:g}",
        *([f"mode {settings['mode']}"] if settings["mode"] else []),
        f"seed {settings['seed']}",
        f"checkpoint {checkpoint['name']}, epoch {checkpoint['epoch']:.4g}",
    ]
    return "; ".join(parts)


def pictures(run: Path) -> dict[str, Path]:
    """The newest picture files of a run, by their kind."""
    found = {kind: latest_picture(run, kind) for kind in PICTURES}
    return {kind: path for kind, path in found.items() if path is not None and path.suffix == ".png"}
