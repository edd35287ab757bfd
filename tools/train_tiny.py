"""Train `glf_fast/metrics/tiny.safetensors`, the feature network of the "tiny" score, on Fashion-MNIST.

    python tools/train_tiny.py [--out FILE] [--epochs 8] [--data-dir DIR]

About four minutes on two CPU cores. The run is seeded, but processors round differently: another machine gives other weights
of the same quality (test accuracy 0.898). Replacing the shipped file therefore changes every "FD[tiny]"; the sha256 in a
score's protocol says which file it was made with.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from glf_fast.data import as_images, load
from glf_fast.files import save_tensors, sha256
from glf_fast.images import to_float
from glf_fast.metrics.tiny import TINY_WEIGHTS, TinyNet

BATCH = 250


def colour(grey: Tensor, generator: torch.Generator) -> Tensor:
    """Grey images (B, 1, H, W) → (B, 3, H, W): half in a random colour on a random ground, half unchanged.

    Trained on grey alone, the network would be free to ignore colour differences between the channels.
    """
    ends = torch.rand(2, len(grey), 3, 1, 1, generator=generator)
    plain = torch.rand(len(grey), 1, 1, 1, generator=generator) < 0.5
    return torch.where(plain, grey.expand(-1, 3, -1, -1), torch.lerp(ends[0], ends[1], grey))


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 (B, 1, 28, 28) → float (B, 3, 28, 28) in [0, 1]: mirrored half of the time, coloured."""
    x = to_float(images)
    mirrored = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
    return colour(torch.where(mirrored, x.flip(3), x), generator)


@torch.no_grad()
def accuracy(model: TinyNet, images: Tensor, labels: Tensor) -> float:
    """Fraction of grey test images whose class is found."""
    model.eval()
    hits = [
        (model.classify(to_float(x).expand(-1, 3, -1, -1)).argmax(1) == y).sum()
        for x, y in zip(images.split(1000), labels.split(1000), strict=True)
    ]
    return float(torch.stack(hits).sum()) / len(images)


def main() -> None:
    """Train, standardise the features, write the file."""
    parser = argparse.ArgumentParser(description="Train the feature network of the 'tiny' score.")
    parser.add_argument("--out", type=Path, default=TINY_WEIGHTS)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--data-dir", type=Path)
    arguments = parser.parse_args()

    train = as_images(load("fashion-mnist", "train", data_dir=arguments.data_dir))
    test = as_images(load("fashion-mnist", "test", data_dir=arguments.data_dir))
    assert train.labels is not None and test.labels is not None
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = TinyNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps = arguments.epochs * (len(train.images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for epoch in range(arguments.epochs):
        model.train()
        for rows in torch.randperm(len(train.images), generator=generator).split(BATCH):
            x = augment(train.images[rows], generator)
            loss = nn.functional.cross_entropy(model.classify(x), train.labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: test accuracy {accuracy(model, test.images, test.labels):.4f}", flush=True)

    with torch.no_grad():
        pooled = torch.cat([model.pooled(to_float(x).expand(-1, 3, -1, -1)) for x in train.images.split(1000)])
    std, mean = torch.std_mean(pooled, 0)
    model.mean.copy_(mean)
    # A channel that hardly ever fires must not be blown up into the loudest feature.
    model.std.copy_(std.clamp(min=0.1 * float(std.median())))
    print(f"std of the features: {std.min():.2e} … {std.median():.2e} … {std.max():.2e}")
    save_tensors(arguments.out, model.state_dict())
    print(f"{arguments.out}  {arguments.out.stat().st_size} bytes  sha256 {sha256(arguments.out)}")


if __name__ == "__main__":
    main()
