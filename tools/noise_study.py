"""VAE with flow prior against GLF: what becomes of samples and codes as the noise vanishes.

    python tools/noise_study.py [--epochs 1] [--out docs/images]

The GLF paper (arXiv:1905.10485) derives GLF as the limit of a VAE with flow prior in which the decoder's variance s² goes to
0: the squared errors, weighted by 1/(2·s²), outweigh the divergence, and the noise of the posterior vanishes. This trains the
VAE with decreasing s, and GLF, with the same networks, optimizers and order of Fashion-MNIST's images. It writes
noise_study.json, in which models that are there already are not trained again, and draws noise_study.svg.

A quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
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
from glf_fast.training.config import Config, DataConfig, OptimizerConfig, default
from glf_fast.training.scoring import evaluate, load_extractors
from glf_fast.training.splits import load_splits
from glf_fast.training.trainer import Trainer

DEVIATIONS = (0.5, 0.1, 0.03, 0.01, 0.003)
SMALL: dict[str, Any] = {"latent_dim": 16, "width": 8, "hidden": 128, "flow": FlowSettings(hidden=(64, 64))}


def configuration(deviation: float | None, epochs: int) -> Config:
    """The run of a VAE with flow prior and this deviation s of the decoder; of GLF for None."""
    config = default("glf" if deviation is None else "flow-vae")
    own: dict[str, Any] = {} if deviation is None else {"variance": "fixed", "deviation": deviation}
    optimizer = OptimizerConfig(warmup_steps=50, schedule="cosine", clip=0.0)
    optimizers = {"autoencoder": optimizer, "flow": replace(optimizer, lr=3e-3, betas=(0.9, 0.99), clip=10.0)}
    model = replace(config.model, **SMALL, **own)
    return replace(config, model=model, optimizers=optimizers, epochs=epochs, batch_size=128)


def trained(config: Config, train: Any) -> GenerativeModel:
    """The model after training on the CPU, with the order of images and the random numbers of `glf_fast.train`."""
    trainer = Trainer(config, train, torch.device("cpu"))
    inputs = trainer.inputs()
    for epoch in range(config.epochs):
        order = torch.randperm(len(inputs), generator=seeds.generator(config.seed, "order", epoch))
        for batch in order[: trainer.images_per_epoch].split(config.batch_size):
            trainer.step(inputs[batch])
    return trainer.model.eval()


def measured(model: GenerativeModel, train: Any, test: Any) -> dict[str, float]:
    """Fréchet distances, and the codes of the test images: their standard deviation, and the posterior's around each."""
    assert isinstance(model, (GLF, FlowVAE))
    [scores] = evaluate(model, as_images(train), as_images(test), load_extractors(["tiny"], device="cpu"), n=5000)
    x = to_float(test.items)
    with torch.no_grad():
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


def draw(results: dict[str, Any], path: Path) -> None:
    """The curves against s, GLF's values as lines across."""
    rows = {float(name): row for name, row in results["models"].items() if name != "glf"}
    glf, s = results["models"]["glf"], sorted(rows, reverse=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")

    def curve(axis: Axes, key: str, label: str, colour: str) -> None:
        axis.plot(s, [rows[x][key] for x in s], "o-", color=colour, label=f"VAE with flow prior, {label}")
        axis.axhline(glf[key], ls="--", color=colour, label=f"GLF, {label}")

    curve(left, "samples", "samples", "C0")
    curve(left, "reconstructions", "reconstructions", "C1")
    left.set(ylabel="FD[tiny], lower is better", ylim=(0, None))
    curve(right, "error", "error of a pixel (rms)", "C1")
    right.plot(s, [rows[x]["noise"] / rows[x]["spread"] for x in s], "o-", color="C2", label="noise / spread of codes")
    right.set(ylabel="standard deviations", yscale="log")
    for axis in (left, right):
        axis.set(xscale="log", xlabel="standard deviation s of the decoder")
        axis.invert_xaxis()
        axis.legend(fontsize=8)
    figure.savefig(path)


def main() -> None:
    """Train what is missing, and draw."""
    matplotlib.use("Agg")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    arguments = parser.parse_args()
    file = arguments.out / "noise_study.json"
    about = {
        "data": "fashion-mnist",
        "epochs": arguments.epochs,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"about": about, "models": {}}
    if results["about"] != about:
        parser.error(f"{file} has the results of another study: {results['about']}; remove it, or choose another --out")
    train, test = load_splits(DataConfig(about["data"]), None)
    for deviation in (None, *DEVIATIONS):
        name = "glf" if deviation is None else str(deviation)
        if name not in results["models"]:
            start = time.perf_counter()
            model = trained(configuration(deviation, arguments.epochs), train)
            results["models"][name] = measured(model, train, test)
            write_json(file, results)
            row = "  ".join(f"{key} {value:.4g}" for key, value in results["models"][name].items())
            print(f"{name:6} {row}  ({time.perf_counter() - start:.0f} s)", flush=True)
    draw(results, arguments.out / "noise_study.svg")


if __name__ == "__main__":
    main()
