"""VAE with flow prior against GLF: what becomes of samples and codes as the noise vanishes.

    python tools/noise_study.py [--out docs/images]

The GLF paper (arXiv:1905.10485) derives GLF as the limit of a VAE with flow prior in which the decoder's variance s² goes to
0: the squared errors, weighted by 1/(2·s²), outweigh the divergence, and the noise of the posterior vanishes.

Both models train side by side on Fashion-MNIST, with the same networks, optimizers and order of the images. s decreases from
one epoch to the next, and after each epoch both models are measured, so that they have always seen the same images. A VAE that
begins with a small s is no measure: its codes are far smaller than the noise at the start, its decoder learns from noise, and
after an epoch its errors are those of five dimensions, whatever s is.

Writes noise_study.json and noise_study.svg. A quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import os
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

from glf_fast import seeds
from glf_fast.data import as_images
from glf_fast.files import write_json
from glf_fast.images import to_float
from glf_fast.models import GLF, GenerativeModel
from glf_fast.models.flow_settings import FlowSettings
from glf_fast.models.flow_vae import FlowVAE
from glf_fast.training.config import DataConfig, OptimizerConfig, default
from glf_fast.training.scoring import evaluate, load_extractors
from glf_fast.training.splits import load_splits
from glf_fast.training.trainer import Trainer

DEVIATIONS = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
SMALL: dict[str, Any] = {"latent_dim": 16, "width": 8, "hidden": 128, "flow": FlowSettings(hidden=(64, 64))}


def trainer(name: str, own: dict[str, Any], train: Any) -> Trainer:
    """The trainer of one model, with constant learning rates."""
    config = default(name)
    optimizer = OptimizerConfig(warmup_steps=50, decay_every=0)
    optimizers = {"autoencoder": optimizer, "flow": replace(optimizer, lr=3e-3, betas=(0.9, 0.99), clip=10.0)}
    model = replace(config.model, **SMALL, **own)
    config = replace(config, model=model, optimizers=optimizers, epochs=len(DEVIATIONS), batch_size=128)
    return Trainer(config, train, torch.device("cpu"))


def train_epoch(trainer: Trainer, epoch: int) -> None:
    """An epoch with the order of images and the random numbers of `glf_fast.train`."""
    inputs = trainer.inputs()
    order = torch.randperm(len(inputs), generator=seeds.generator(trainer.config.seed, "order", epoch))
    for batch in order[: trainer.images_per_epoch].split(trainer.config.batch_size):
        trainer.step(inputs[batch])


def measured(model: GenerativeModel, train: Any, test: Any) -> dict[str, float]:
    """Fréchet distances, and the codes of the test images: their standard deviation, and the posterior's around each."""
    assert isinstance(model, (GLF, FlowVAE))
    [scores] = evaluate(model, as_images(train), as_images(test), load_extractors(["tiny"], device="cpu"), n=5000)
    x = to_float(test.items)
    with model.evaluating():
        h = torch.cat([model.encoder(batch) for batch in x.split(500)])
        error = torch.cat([model.reconstruct(batch) for batch in x.split(500)]).sub(x).square().mean()
    mean, *log_variance = h.split(model.settings.latent_dim, 1)
    return {
        "samples": scores["samples"]["value"],
        "reconstructions": scores["reconstructions"]["value"],
        "error": error.sqrt().item(),
        "spread": mean.var(0).mean().sqrt().item(),
        "noise": log_variance[0].exp().mean().sqrt().item() if log_variance else 0.0,
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Both models' curves against s."""
    s = [row["deviation"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")

    def curves(axis: Axes, key: str, label: str, colour: str) -> None:
        axis.plot(s, [row["vae"][key] for row in rows], "o-", color=colour, label=f"VAE with flow prior, {label}")
        axis.plot(s, [row["glf"][key] for row in rows], "x--", color=colour, label=f"GLF, {label}")

    curves(left, "samples", "samples", "C0")
    curves(left, "reconstructions", "reconstructions", "C1")
    left.set(ylabel="FD[tiny], lower is better", ylim=(0, None))
    curves(right, "error", "error of a pixel (rms)", "C1")
    right.plot(
        s,
        [row["vae"]["noise"] / row["vae"]["spread"] for row in rows],
        "o-",
        color="C2",
        label="noise / spread of codes",
    )
    right.set(ylabel="standard deviations", yscale="log")
    for axis in (left, right):
        axis.set(xscale="log", xlabel="standard deviation s of the VAE's decoder, an epoch each")
        axis.invert_xaxis()
        axis.legend(fontsize=8)
    figure.savefig(path)


def main() -> None:
    """Train, measure and draw."""
    matplotlib.use("Agg")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    arguments = parser.parse_args()
    train, test = load_splits(DataConfig("fashion-mnist"), None)
    trainers = {"vae": trainer("flow-vae", {"variance": "fixed"}, train), "glf": trainer("glf", {}, train)}
    rows: list[dict[str, Any]] = []
    for epoch, deviation in enumerate(DEVIATIONS):
        vae = trainers["vae"].model
        assert isinstance(vae, FlowVAE)
        vae.variance.fill_(deviation**2)
        row: dict[str, Any] = {"epoch": epoch + 1, "deviation": deviation}
        for name, one in trainers.items():
            train_epoch(one, epoch)
            row[name] = measured(one.model, train, test)
            print(
                f"{deviation:<6} {name}  " + "  ".join(f"{key} {value:.4g}" for key, value in row[name].items()),
                flush=True,
            )
        rows.append(row)
    about = {
        "data": "fashion-mnist",
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }
    write_json(arguments.out / "noise_study.json", {"about": about, "rows": rows})
    draw(rows, arguments.out / "noise_study.svg")


if __name__ == "__main__":
    main()
