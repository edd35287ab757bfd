"""What a GLF gains by its flow: its score beside simpler ways to sample.

    python tools/without_flow.py RUN [--extractor vgg16] [--n 5000] [--out FILE.json]

* `pca-gaussian`: a normal distribution over the first principal components of the pixels, as many as the model has latents;
* `standard-normal`, `fitted-normal`: the model's own decoder on N(0, I), and on the normal distribution fitted to its codes;
* `flow`: the model's samples; `reconstructions`: of test images.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from glf_fast import data, metrics
from glf_fast.command_line import parse
from glf_fast.errors import UserError, run_command
from glf_fast.files import write_json
from glf_fast.images import to_float, to_uint8
from glf_fast.models import GLF
from glf_fast.training import checkpoint, runs
from glf_fast.training.pictures import draw
from glf_fast.training.scoring import reconstructions


@dataclass(frozen=True)
class Command:
    """Score a trained GLF beside simpler ways to sample."""

    run: tyro.conf.Positional[Path]
    """The run's folder."""
    extractor: str = "vgg16"
    """Feature network."""
    n: int = 5000
    """Images of each kind."""
    out: Path | None = None
    """Write the scores with their protocol to this JSON file, too."""


@torch.no_grad()
def pca_gaussian(images: Tensor, components: int, n: int, generator: torch.Generator) -> Tensor:
    """n samples of the normal distribution over the first principal components of uint8 images, as uint8."""
    x = to_float(images).flatten(1)
    mean = x.mean(0)
    variances, axes = torch.linalg.eigh(torch.cov(x.T))
    scales, axes = variances[-components:].clamp(min=0).sqrt(), axes[:, -components:]
    noise = torch.randn(n, components, generator=generator)
    return to_uint8((mean + (noise * scales) @ axes.T).view(n, *images.shape[1:]))


@torch.no_grad()
def main() -> None:
    """Parse, sample in every way, score, print."""
    command = parse(Command, sys.argv[1:], "tools/without_flow.py")
    config = runs.read_config(command.run)
    model, state = checkpoint.load_model(runs.checkpoint_folder(command.run, "best"), torch.device("cpu"))
    if not isinstance(model, GLF):
        raise UserError(f"{command.run} holds a {type(model).__name__}, not a GLF")
    train, test = (
        data.as_images(data.load(config.data.source, s, image_size=config.data.image_size)) for s in data.SPLITS
    )
    extractor = metrics.extractor(command.extractor)
    reference = metrics.reference(train, test, extractor, n=command.n)
    generator = torch.Generator().manual_seed(0)

    def decode(z: Tensor) -> Tensor:
        return to_uint8(torch.cat([model.decode(part) for part in z.split(500)]))

    codes = torch.cat([model.encode(to_float(part)) for part in train.images.split(500)])
    spread = torch.linalg.cholesky(torch.cov(codes.T))
    noise = torch.randn(command.n, model.settings.latent_dim, generator=generator)
    images = {
        "pca-gaussian": pca_gaussian(train.images, model.settings.latent_dim, command.n, generator),
        "standard-normal": decode(noise),
        "fitted-normal": decode(codes.mean(0) + noise @ spread.T),
        "flow": draw(model, command.n, seed=0),
        "reconstructions": torch.cat(list(reconstructions(model, test.images, command.n))),
    }
    about = {"run": command.run.name, "epoch": state["epoch"]}
    scores = {
        name: metrics.score(x, reference, extractor, seed=0, sampling={"kind": name, **about})
        for name, x in images.items()
    }
    for name, score in scores.items():
        print(f"{name:16} {metrics.summary(score)}")
    if command.out:
        write_json(command.out, scores)


if __name__ == "__main__":
    run_command(main)
