"""Train a small classifier, whose features and classes are those of a score: "tiny", "tiny-mnist" or "tiny-cifar10".

    python tools/train_tiny.py [--data fashion-mnist] [--out FILE] [--epochs 8] [--data-dir DIR]

The networks of Fashion-MNIST and MNIST are shipped (glf_fast/metrics/tiny.safetensors, tiny_mnist.safetensors); that of
CIFAR-10 is a file that the user trains and gives with --weights. About four minutes on two CPU cores for Fashion-MNIST, and two
for the ten epochs of the shipped network of MNIST. The run is seeded, but processors round differently: another machine gives
other weights of the same quality (test accuracy 0.898 on Fashion-MNIST, 0.982 on MNIST). Replacing a shipped file therefore
changes every score by it; the sha256 in a score's protocol says which file it was made with.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from glf_fast.data import as_images, load
from glf_fast.files import save_tensors, sha256
from glf_fast.images import to_float
from glf_fast.metrics.resize import antialiased
from glf_fast.metrics.tiny import TINY_MNIST_WEIGHTS, TINY_SIZE, TINY_WEIGHTS, TinyNet

BATCH = 250
# Digits are easier: a network of a tenth of the size finds them (46 kB against 536 kB).
WIDTHS = {"fashion-mnist": (32, 64, 96, 64), "mnist": (8, 16, 24, 24), "cifar10": (32, 64, 96, 64)}
FILES = {"fashion-mnist": TINY_WEIGHTS, "mnist": TINY_MNIST_WEIGHTS, "cifar10": Path("tiny_cifar10.safetensors")}
MIRRORED = {"fashion-mnist", "cifar10"}  # a mirrored digit is no digit


def colour(x: Tensor, generator: torch.Generator) -> Tensor:
    """Images (B, 1 or 3, H, W) → (B, 3, H, W): half of the grey ones in a random colour on a random ground, others unchanged.

    Trained on grey alone, the network would be free to ignore colour differences between the channels.
    """
    if x.shape[1] == 3:
        return x
    ends = torch.rand(2, len(x), 3, 1, 1, generator=generator)
    plain = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
    return torch.where(plain, x.expand(-1, 3, -1, -1), torch.lerp(ends[0], ends[1], x))


def augment(x: Tensor, mirrored: bool, generator: torch.Generator) -> Tensor:
    """Float images → (B, 3, H, W): mirrored half of the time if they may be, coloured."""
    if mirrored:
        chosen = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
        x = torch.where(chosen, x.flip(3), x)
    return colour(x, generator)


def prepared(images: Tensor) -> Tensor:
    """uint8 images → float in [0, 1] of the network's size, with their own number of channels."""
    return antialiased(to_float(images), TINY_SIZE, TINY_SIZE)


@torch.no_grad()
def accuracy(model: TinyNet, images: Tensor, labels: Tensor) -> float:
    """Fraction of test images whose class is found."""
    model.eval()
    hits = [
        (model.classify(prepared(x).expand(-1, 3, -1, -1)).argmax(1) == y).sum()
        for x, y in zip(images.split(1000), labels.split(1000), strict=True)
    ]
    return float(torch.stack(hits).sum()) / len(images)


def main() -> None:
    """Train, standardise the features, write the file."""
    parser = argparse.ArgumentParser(
        description="Train the network of the score 'tiny', 'tiny-mnist' or 'tiny-cifar10'."
    )
    parser.add_argument("--data", choices=WIDTHS, default="fashion-mnist")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--data-dir", type=Path)
    arguments = parser.parse_args()

    data, out = arguments.data, arguments.out or FILES[arguments.data]
    train = as_images(load(data, "train", data_dir=arguments.data_dir))
    test = as_images(load(data, "test", data_dir=arguments.data_dir))
    assert train.labels is not None and test.labels is not None
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = TinyNet(WIDTHS[data]).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps = arguments.epochs * (len(train.images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for epoch in range(arguments.epochs):
        model.train()
        for rows in torch.randperm(len(train.images), generator=generator).split(BATCH):
            x = augment(prepared(train.images[rows]), data in MIRRORED, generator)
            loss = nn.functional.cross_entropy(model.classify(x), train.labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: test accuracy {accuracy(model, test.images, test.labels):.4f}", flush=True)

    with torch.no_grad():
        pooled = torch.cat([model.pooled(prepared(x).expand(-1, 3, -1, -1)) for x in train.images.split(1000)])
    std, mean = torch.std_mean(pooled, 0)
    model.mean.copy_(mean)
    # A channel that hardly ever fires must not be blown up into the loudest feature.
    model.std.copy_(std.clamp(min=0.1 * float(std.median())))
    print(f"std of the features: {std.min():.2e} … {std.median():.2e} … {std.max():.2e}")
    save_tensors(out, model.state_dict())
    print(f"{out}  {out.stat().st_size} bytes  sha256 {sha256(out)}")


if __name__ == "__main__":
    main()
