"""Extractors: networks that turn uint8 images into feature vectors, with all that defines the features recorded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glf_fast.data.weights import INCEPTION_SHA256, fetch
from glf_fast.errors import UserError, did_you_mean
from glf_fast.files import sha256
from glf_fast.metrics.inception import load_inception
from glf_fast.metrics.resize import antialiased, tf1_bilinear
from glf_fast.metrics.tiny import TINY_MNIST_WEIGHTS, TINY_SIZE, TINY_WEIGHTS, load_tiny
from glf_fast.metrics.vgg16 import IMAGENET_MEAN, IMAGENET_STD, VGG16, load_vgg16

__all__ = ["CLASSIFIERS", "UNPUBLISHED", "Extractor", "check_images", "extractor", "label", "names"]


@contextlib.contextmanager
def _full_float32(device: torch.device) -> Iterator[None]:
    """Run convolutions in IEEE float32 with deterministic algorithms, whatever the process has set for training."""
    cudnn: Any = torch.backends.cudnn  # both modules define their attributes at run time
    mkldnn: Any = torch.backends.mkldnn
    before = cudnn.conv.fp32_precision, mkldnn.conv.fp32_precision, cudnn.benchmark, cudnn.deterministic
    cudnn.conv.fp32_precision = mkldnn.conv.fp32_precision = "ieee"
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        cudnn.conv.fp32_precision, mkldnn.conv.fp32_precision, cudnn.benchmark, cudnn.deterministic = before


class Extractor(nn.Module):
    """A feature network with its preprocessing: uint8 images (B, C, H, W), C = 1 or 3 → float32 features (B, dim).

    Grey images are repeated to three channels. The network always runs on exactly `chunk` images; the last chunk is filled up
    with black images. Convolution libraries choose algorithms by batch size, and a score must not depend on the batch size.
    The extractor runs in full float32 (no TF32, no autocast), builds no graph, and stays in eval mode.

    Attributes:
        name: key in the registry.
        dim: number of features of an image.
        classes: number of classes of `logits`; 0 if the network does not classify.
        tells_colours: whether colour images of one class have as many modes as ColorMNIST has colours.
        weights_sha256: hash of the weights file.
        resize, grey: preprocessing of the images, in words.
    """

    grey = "repeat"

    def __init__(
        self,
        name: str,
        network: nn.Module,
        prepare: Callable[[Tensor], Tensor],
        *,
        dim: int,
        weights_sha256: str,
        resize: str,
        chunk: int,
        classes: int = 0,
        tells_colours: bool = False,
    ) -> None:
        super().__init__()
        self.classes, self.tells_colours = classes, tells_colours
        self.name, self.dim, self.weights_sha256, self.resize, self.chunk = name, dim, weights_sha256, resize, chunk
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._prepare = prepare
        self.eval().requires_grad_(False)

    @property
    def identity(self) -> dict[str, Any]:
        """Description of the extractor, JSON-ready. Features may be compared only if their identities are equal."""
        return {
            "name": self.name,
            "dim": self.dim,
            "weights_sha256": self.weights_sha256,
            "resize": self.resize,
            "grey": self.grey,
        }

    @property
    def label(self) -> str:
        """Name of a Fréchet distance of these features."""
        return label(self.identity)

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return next(self.network.parameters()).device

    def train(self, mode: bool = True) -> Extractor:
        """Keep eval mode: the network of a score is never trained, even inside a model in training mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features (B, dim), float32, on the extractor's device. Raises ValueError for anything but uint8 (B, 1 or 3, H, W)."""
        check_images(images)
        features = [torch.empty(0, self.dim, device=self.device)]
        with _full_float32(self.device):
            for part in images.split(self.chunk):
                x = F.pad(part.to(self.device), (0, 0, 0, 0, 0, 0, 0, self.chunk - len(part)))
                x = self._prepare(x.expand(-1, 3, -1, -1).float())
                features.append(self.network(x.contiguous(memory_format=torch.channels_last))[: len(part)])
        return torch.cat(features)

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """Logits (B, classes) of images from their features (B, dim). Raises ValueError if the network does not classify."""
        if not self.classes:
            raise ValueError(f"the network {self.name!r} does not classify images")
        with torch.autocast(self.device.type, enabled=False):
            return self.network.logits(features.to(self.device))


def label(identity: Mapping[str, Any] | None) -> str:
    """Name of a Fréchet distance: "FID" for the published Inception weights, "FD[name]" for others, "FD" if unknown."""
    if identity is None:
        return "FD"
    return "FID" if identity["weights_sha256"] == INCEPTION_SHA256 else f"FD[{identity['name']}]"


def check_images(images: Tensor) -> None:
    """Raise UserError, with the remedy, for anything but uint8 images (B, 1 or 3, H, W)."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise UserError(
            f"scores need uint8 images, got {kind}; glf_fast.images.to_uint8 converts floats in [0, 1] to pixels"
        )
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape[1:]:
        raise UserError(f"scores need images (batch, 1 or 3 channels, height, width), got {tuple(images.shape)}")


# -- the registry -------------------------------------------------------------------------------------------------------


class _PooledVGG16(nn.Module):
    def __init__(self, vgg16: VGG16, tap: int) -> None:
        super().__init__()
        self.vgg16, self.tap = vgg16, tap

    def forward(self, x: Tensor) -> Tensor:
        return self.vgg16(x, [self.tap])[0].mean((2, 3))


def _prepare_vgg16(x: Tensor) -> Tensor:
    height, width = x.shape[2:]
    if max(height, width) > 224:
        scale = 224 / max(height, width)
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
        x = antialiased(x, height, width)
    top, left = max(0, 32 - height) // 2, max(0, 32 - width) // 2
    x = F.pad(x, (left, max(0, 32 - width) - left, top, max(0, 32 - height) - top))
    mean, std = x.new_tensor(IMAGENET_MEAN), x.new_tensor(IMAGENET_STD)
    return (x / 255 - mean[:, None, None]) / std[:, None, None]


def _vgg16(name: str, weights: Path | None, tap: int, dim: int) -> Extractor:
    weights = weights or fetch("vgg16")
    return Extractor(
        name,
        _PooledVGG16(load_vgg16(weights), tap),
        _prepare_vgg16,
        dim=dim,
        weights_sha256=sha256(weights),
        resize="black border up to 32, unchanged up to 224, antialiased bilinear to 224 above",
        chunk=64,
    )


def _tiny(name: str, weights: Path | None) -> Extractor:
    shipped = {"tiny": TINY_WEIGHTS, "tiny-mnist": TINY_MNIST_WEIGHTS}.get(name)
    if shipped and weights is not None:
        raise UserError(f"the extractor {name!r} has its own weights; do not give other weights")
    weights = shipped or weights
    if weights is None:
        raise UserError(
            f"the extractor {name!r} has no weights in the package; train it with python tools/train_tiny.py --data cifar10, "
            "and give the file to python -m glf_fast.metrics with --weights (for a classifier beside "
            "the extractor: --classifier-weights)"
        )
    network = load_tiny(weights)
    return Extractor(
        name,
        network,
        lambda x: antialiased(x, TINY_SIZE, TINY_SIZE) / 255,
        dim=network.dim,
        weights_sha256=sha256(weights),
        resize=f"antialiased bilinear to {TINY_SIZE}",
        chunk=256,
        classes=network.head.out_features,
        tells_colours=name == "tiny-mnist",
    )


def _inception(name: str, weights: Path | None) -> Extractor:
    weights = weights or fetch("inception")
    return Extractor(
        name,
        load_inception(weights),
        lambda x: (tf1_bilinear(x, 299, 299) - 128) / 128,
        dim=2048,
        weights_sha256=sha256(weights),
        resize="TensorFlow 1 bilinear to 299",
        chunk=16,
        classes=1008,
    )


_REGISTRY: dict[str, Callable[[str, Path | None], Extractor]] = {
    "tiny": _tiny,
    "vgg16": lambda name, weights: _vgg16(name, weights, tap=29, dim=512),  # relu5_3
    "vgg16-relu4_3": lambda name, weights: _vgg16(name, weights, tap=22, dim=512),
    "vgg16-relu3_3": lambda name, weights: _vgg16(name, weights, tap=15, dim=256),
    "vgg16-relu2_2": lambda name, weights: _vgg16(name, weights, tap=8, dim=128),
    "inception": _inception,
    "tiny-mnist": _tiny,
    "tiny-cifar10": _tiny,
}
# Names of the extractors that classify.
CLASSIFIERS = ("tiny", "inception", "tiny-mnist", "tiny-cifar10")
# Names of the extractors whose weights only their users have, so that a run, which gives none, cannot have them.
UNPUBLISHED = ("tiny-cifar10",)


def names() -> tuple[str, ...]:
    """Names of all extractors."""
    return tuple(_REGISTRY)


def extractor(name: str, *, device: torch.device | str = "cpu", weights: Path | None = None) -> Extractor:
    """The extractor called `name`, ready on `device`.

    Args:
        weights: local file instead of the cached or downloaded one (VGG16: safetensors with torchvision's names; Inception: the
            published `.pth`; tiny-cifar10: the file that `tools/train_tiny.py` has written). A distance is called FID only with
            the published weights.

    Raises:
        UserError: no such extractor, or a weights file of another network.
    """
    if name not in _REGISTRY:
        raise UserError(
            f"no extractor {name!r}; {did_you_mean(name, _REGISTRY)}the extractors are {', '.join(names())}"
        )
    return _REGISTRY[name](name, weights).to(device)
