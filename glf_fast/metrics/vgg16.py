"""The convolutions of VGG16, with torchvision's parameter names: features for scores and for the perceptual loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from glf_fast.data.weights import fetch
from glf_fast.errors import UserError

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "VGG16", "load_vgg16"]

# Per-channel statistics of ImageNet for pixels in [0, 1]. LPIPS uses the same map, written for pixels in [-1, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Configuration D of Simonyan & Zisserman (arXiv:1409.1556), table 1: output channels of the 3×3 convolutions; 0 is a pooling.
_CHANNELS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)


class VGG16(nn.Module):
    """The 13 convolutions of VGG16 (arXiv:1409.1556, configuration D) as `features.0` … `features.30`.

    Indices count layers as torchvision does: a ReLU has the index of its convolution plus one. So relu1_2, relu2_2, relu3_3,
    relu4_3 and relu5_3 have the indices 3, 8, 15, 22 and 29.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in _CHANNELS:
            if width:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            else:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)

    def forward(self, x: Tensor, taps: Sequence[int]) -> list[Tensor]:
        """Outputs of `features[: tap + 1]` for every tap, in the order of `taps`, in one pass that stops at the last tap.

        Args:
            x: float images (B, 3, H, W), already normalised by `IMAGENET_MEAN` and `IMAGENET_STD`. Each pooling halves H and W
                (rounding down), so H and W must be at least 2^p for a tap after p poolings.
            taps: indices in 0 … 30.

        Raises:
            ValueError: no tap, a tap out of range, or x not (B, 3, H, W).
        """
        if not taps or min(taps) < 0 or max(taps) >= len(self.features):
            raise ValueError(f"taps must be indices in 0 … {len(self.features) - 1}, got {list(taps)}")
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(
                f"VGG16 needs images (B, 3, H, W), got {tuple(x.shape)}; repeat a grey channel three times"
            )
        outputs: dict[int, Tensor] = {}
        for index, layer in enumerate(self.features):
            if index > max(taps):
                break
            # The ReLUs work in place to halve the memory, so the output of a tapped convolution is cloned.
            x = layer(x.clone() if index - 1 in taps and isinstance(layer, nn.ReLU) else x)
            if index in taps:
                outputs[index] = x
        return [outputs[tap] for tap in taps]


def load_vgg16(weights: Path | None = None) -> VGG16:
    """VGG16 with its ImageNet weights, in eval mode and without gradients for its parameters.

    Args:
        weights: safetensors file with torchvision's key names (keys outside `features.` are ignored); by default the verified
            file that `glf_fast.data.weights.fetch("vgg16")` finds or downloads.

    Raises:
        UserError: the file is not a VGG16 weights file.
    """
    weights = weights or fetch("vgg16")
    model = VGG16()
    try:
        state = {key: value for key, value in load_file(weights).items() if key.startswith("features.")}
        model.load_state_dict(state)
    except FileNotFoundError:
        raise
    except Exception as error:  # safetensors raises its own type, load_state_dict a RuntimeError
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{weights} does not hold VGG16 weights as safetensors with torchvision's names ({reason})"
        ) from error
    return model.eval().requires_grad_(False)
