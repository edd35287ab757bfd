"""A small Glow: image couplings with a convolutional conditioner of your own, 1 × 1 convolutions and ActNorms.

    python examples/glow.py [--quick] [--out FOLDER]

The images are scikit-learn's handwritten digits, 8 × 8 with 16 grey levels, squeezed to 4 channels of 4 × 4; nothing is
downloaded. Glow is arXiv:1807.03039. `AffineCoupling` takes any network; all affine maps between two couplings are one product.
"""

import argparse
import math
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from tqdm import trange

from glf_fast import ActNorm, AffineCoupling, InvertibleLinear, SequentialFlow, Squeeze


def conditioner(n_in: int, width: int, n_out: int) -> nn.Sequential:
    """Convolutions of 3 × 3, 1 × 1 and 3 × 3; the last convolution starts at zero."""
    first, last = nn.Conv2d(n_in, width, 3, padding=1), nn.Conv2d(width, n_out, 3, padding=1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(first, nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU(), last)


def glow(steps: int, width: int) -> SequentialFlow:
    """Steps of ActNorm, 1 × 1 convolution and coupling on images (B, 1, 8, 8), squeezed to (B, 4, 4, 4)."""
    layers: list[nn.Module] = [Squeeze()]
    for _ in range(steps):
        layers += [ActNorm(4), InvertibleLinear(4), AffineCoupling(4, conditioner(2, width, 4))]
    return SequentialFlow(layers, (1, 8, 8))


def main() -> None:
    matplotlib.use("Agg")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/examples"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    levels = torch.tensor(load_digits().images, dtype=torch.float32)[torch.randperm(1797)]
    train, test = levels.clamp(max=15)[:, None].split([1500, 297])
    test = dequantised(test)

    flow = glow(*(2, 8) if arguments.quick else (12, 48))
    optimizer = torch.optim.AdamW(flow.parameters(), 2e-3, weight_decay=0.1, fused=True)
    epochs = 2 if arguments.quick else 60
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    progress = trange(epochs, desc="Glow")
    for _ in progress:
        for batch in train[torch.randperm(len(train))].split(125):
            loss = -flow.log_prob(dequantised(batch)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        progress.set_postfix(bits=f"{bits(loss):.3f}")
    flow.eval()
    with torch.no_grad():
        ours = bits(-flow.log_prob(test).mean())
        x = dequantised(train).flatten(1)
        normal = MultivariateNormal(x.mean(0), x.T.cov())
        baseline = bits(-normal.log_prob(test.flatten(1)).mean())

    samples = {
        "Glow": flow.sample(64, temperature=0.8),
        "normal distribution": normal.sample((64,)),
        "digits": test[:64],
    }
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.6))
    for axis, (name, batch) in zip(axes, samples.items(), strict=True):
        images = batch.reshape(8, 8, 8, 8).clamp(0, 1)
        grid = nn.functional.pad(images, (2, 2, 2, 2)).permute(0, 2, 1, 3)
        axis.imshow(grid.reshape(96, 96).numpy(), cmap="gray_r")
        axis.set(title=name, xticks=[], yticks=[])
    figure.savefig(arguments.out / "glow.png", dpi=120, bbox_inches="tight")
    print(f"test images: {ours:.3f} bits a pixel, {baseline:.3f} with a normal distribution")
    print(f"gained: {baseline - ours:.3f} bits a pixel; see {arguments.out / 'glow.png'}")


def dequantised(levels: Tensor) -> Tensor:
    """Grey levels 0 … 15 (B, 1, 8, 8) → [0, 1]; uniform noise makes the discrete levels continuous."""
    return (levels + torch.rand_like(levels)) / 16


def bits(nll: Tensor) -> float:
    """Bits per pixel with 16 grey levels, from the nll in nats per image of a density on [0, 1]."""
    return nll.item() / (64 * math.log(2)) + 4


if __name__ == "__main__":
    main()
