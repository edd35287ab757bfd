"""The Inception network by which FID is defined, with the parameter names of its published PyTorch weights.

The network is Inception-v3 (arXiv:1512.00567) in the form of TensorFlow's graph of 2015-12-05. It differs from torchvision's:
1008 classes, average pooling that does not count padding, and a max-pooling branch in the last block.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glf_fast.errors import UserError

__all__ = ["FIDInception", "load_inception"]

# Kernel and padding of the factorised convolutions.
ROW_3, COLUMN_3 = ((1, 3), (0, 1)), ((3, 1), (1, 0))
ROW_7, COLUMN_7 = ((1, 7), (0, 3)), ((7, 1), (3, 0))


class _Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU; `kernel` and `padding` are one number or (height, width)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        stride: int = 1,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class _BlockA(nn.Module):
    """35×35: 1×1, 5×5, double 3×3, pooled."""

    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(inputs, 64)
        self.branch5x5_1 = _Conv(inputs, 48)
        self.branch5x5_2 = _Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = _Conv(inputs, 64)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, padding=1)
        self.branch_pool = _Conv(inputs, pooled)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(_average(x))], 1)


class _BlockB(nn.Module):
    """35×35 → 17×17."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = _Conv(inputs, 64)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class _BlockC(nn.Module):
    """17×17: 1×1, 7×7 and double 7×7 as rows and columns, pooled."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(inputs, 192)
        self.branch7x7_1 = _Conv(inputs, width)
        self.branch7x7_2 = _Conv(width, width, *ROW_7)
        self.branch7x7_3 = _Conv(width, 192, *COLUMN_7)
        self.branch7x7dbl_1 = _Conv(inputs, width)
        self.branch7x7dbl_2 = _Conv(width, width, *COLUMN_7)
        self.branch7x7dbl_3 = _Conv(width, width, *ROW_7)
        self.branch7x7dbl_4 = _Conv(width, width, *COLUMN_7)
        self.branch7x7dbl_5 = _Conv(width, 192, *ROW_7)
        self.branch_pool = _Conv(inputs, 192)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_average(x))], 1)


class _BlockD(nn.Module):
    """17×17 → 8×8."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1 = _Conv(inputs, 192)
        self.branch3x3_2 = _Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _Conv(inputs, 192)
        self.branch7x7x3_2 = _Conv(192, 192, *ROW_7)
        self.branch7x7x3_3 = _Conv(192, 192, *COLUMN_7)
        self.branch7x7x3_4 = _Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([three, seven, F.max_pool2d(x, 3, stride=2)], 1)


class _BlockE(nn.Module):
    """8×8: 1×1, split 3×3, double split 3×3, pooled; the second of the two blocks uses max pooling."""

    def __init__(self, inputs: int, max_pool: bool) -> None:
        super().__init__()
        self.max_pool = max_pool
        self.branch1x1 = _Conv(inputs, 320)
        self.branch3x3_1 = _Conv(inputs, 384)
        self.branch3x3_2a = _Conv(384, 384, *ROW_3)
        self.branch3x3_2b = _Conv(384, 384, *COLUMN_3)
        self.branch3x3dbl_1 = _Conv(inputs, 448)
        self.branch3x3dbl_2 = _Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _Conv(384, 384, *ROW_3)
        self.branch3x3dbl_3b = _Conv(384, 384, *COLUMN_3)
        self.branch_pool = _Conv(inputs, 192)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.max_pool else _average(x)
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch3x3_2a(three),
                self.branch3x3_2b(three),
                self.branch3x3dbl_3a(double),
                self.branch3x3dbl_3b(double),
                self.branch_pool(pooled),
            ],
            1,
        )


class FIDInception(nn.Module):
    """Images (B, 3, 299, 299), normalised to (x − 128)/128 from pixels 0 … 255, to pool3 features (B, 2048)."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Conv(64, 80)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3)
        self.Mixed_5b = _BlockA(192, 32)
        self.Mixed_5c = _BlockA(256, 64)
        self.Mixed_5d = _BlockA(288, 64)
        self.Mixed_6a = _BlockB(288)
        self.Mixed_6b = _BlockC(768, 128)
        self.Mixed_6c = _BlockC(768, 160)
        self.Mixed_6d = _BlockC(768, 160)
        self.Mixed_6e = _BlockC(768, 192)
        self.Mixed_7a = _BlockD(768)
        self.Mixed_7b = _BlockE(1280, max_pool=False)
        self.Mixed_7c = _BlockE(2048, max_pool=True)
        self.fc = nn.Linear(2048, 1008)  # used by the Inception score, not by FID

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, 2048)."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean((2, 3))

    def logits(self, features: Tensor) -> Tensor:
        """Logits (B, 1008) of features (B, 2048), without the bias, as in the code by which the Inception score is defined."""
        return (features.double() @ self.fc.weight.double().T).float()  # in float64, so that no TF32 can touch it


def load_inception(weights: Path) -> FIDInception:
    """The network with the weights of a file in the published format (a state dict by `torch.save`), in eval mode.

    The file is read with `weights_only=True`, so it cannot execute code.

    Raises:
        FileNotFoundError: no file at `weights`.
        UserError: the file is not a state dict of this network.
    """
    model = FIDInception()
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        missing, unexpected = model.load_state_dict(state, strict=False)
    except FileNotFoundError:
        raise
    except Exception as error:  # errors of pickle, zip, keys and shapes have many types
        raise UserError(
            f"{weights} is not a readable state dict of the FID Inception ({str(error).splitlines()[0]}); the right file is "
            "pt_inception-2015-12-05-6726825d.pth"
        ) from error
    # The published file was converted from TensorFlow, which counts no batches.
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    if missing or unexpected:
        key = (missing + list(unexpected))[0]
        raise UserError(
            f"{weights} is not a state dict of the FID Inception: {len(missing)} keys are missing, {len(unexpected)} are "
            f"unknown (for instance {key!r}); the right file is pt_inception-2015-12-05-6726825d.pth"
        )
    return model.eval().requires_grad_(False)
