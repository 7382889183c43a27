"""InceptionV3 as TensorFlow's graph of December 2015 computes it: what every published FID means by Inception.

The state dict has the keys of the public weights-inception-2015-12-05-6726825d.pth (torch-fidelity) and
pt_inception-2015-12-05-6726825d.pth (pytorch-fid), which are the same tensors.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d, relu

from genfound.metrics.resize import tf1_resize

SIDE = 299
SPATIAL_CHANNELS = 7
CLASSES = 1008
Pair = int | tuple[int, int]


class Outputs(NamedTuple):
    """What the network says of B images."""

    pool: Tensor  # (B, 2048) after the global average
    spatial: Tensor  # (B, 2023), the first 7 channels of Mixed_6d in (h, w, c) order, as ADM's sFID
    logits: Tensor  # (B, 1008) without the bias, as ADM's Inception Score


class Unit(nn.Module):
    """Convolution without bias, batch norm in eval mode, ReLU."""

    def __init__(self, channels: int, out: int, kernel: Pair, stride: int = 1, padding: Pair = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, out, h', w')."""
        return relu(self.bn(self.conv(x)), inplace=True)


def _average(x: Tensor) -> Tensor:
    return avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _wide(channels: int, out: int) -> Unit:
    return Unit(channels, out, (1, 7), padding=(0, 3))


def _tall(channels: int, out: int) -> Unit:
    return Unit(channels, out, (7, 1), padding=(3, 0))


class BlockA(nn.Module):
    """Mixed_5b, 5c, 5d."""

    def __init__(self, channels: int, pool: int) -> None:
        super().__init__()
        self.branch1x1 = Unit(channels, 64, 1)
        self.branch5x5_1 = Unit(channels, 48, 1)
        self.branch5x5_2 = Unit(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Unit(channels, 64, 1)
        self.branch3x3dbl_2 = Unit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Unit(96, 96, 3, padding=1)
        self.branch_pool = Unit(channels, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, 35, 35) -> (B, 224 + pool, 35, 35)."""
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(_average(x))], dim=1)


class BlockB(nn.Module):
    """Mixed_6a."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3 = Unit(channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = Unit(channels, 64, 1)
        self.branch3x3dbl_2 = Unit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Unit(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 288, 35, 35) -> (B, 768, 17, 17)."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, max_pool2d(x, 3, stride=2)], dim=1)


class BlockC(nn.Module):
    """Mixed_6b, 6c, 6d, 6e."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.branch1x1 = Unit(channels, 192, 1)
        self.branch7x7_1 = Unit(channels, inner, 1)
        self.branch7x7_2 = _wide(inner, inner)
        self.branch7x7_3 = _tall(inner, 192)
        self.branch7x7dbl_1 = Unit(channels, inner, 1)
        self.branch7x7dbl_2 = _tall(inner, inner)
        self.branch7x7dbl_3 = _wide(inner, inner)
        self.branch7x7dbl_4 = _tall(inner, inner)
        self.branch7x7dbl_5 = _wide(inner, 192)
        self.branch_pool = Unit(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 768, 17, 17) -> the same shape."""
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_average(x))], dim=1)


class BlockD(nn.Module):
    """Mixed_7a."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3_1 = Unit(channels, 192, 1)
        self.branch3x3_2 = Unit(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Unit(channels, 192, 1)
        self.branch7x7x3_2 = _wide(192, 192)
        self.branch7x7x3_3 = _tall(192, 192)
        self.branch7x7x3_4 = Unit(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 768, 17, 17) -> (B, 1280, 8, 8)."""
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([three, seven, max_pool2d(x, 3, stride=2)], dim=1)


class BlockE(nn.Module):
    """Mixed_7b, whose pool is an average, and 7c, whose pool is a maximum."""

    def __init__(self, channels: int, pool: str) -> None:
        super().__init__()
        self.pool = pool
        self.branch1x1 = Unit(channels, 320, 1)
        self.branch3x3_1 = Unit(channels, 384, 1)
        self.branch3x3_2a = Unit(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = Unit(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = Unit(channels, 448, 1)
        self.branch3x3dbl_2 = Unit(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Unit(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = Unit(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = Unit(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, 8, 8) -> (B, 2048, 8, 8)."""
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = _average(x) if self.pool == "average" else max_pool2d(x, 3, stride=1, padding=1)
        threes = [self.branch3x3_2a(three), self.branch3x3_2b(three)]
        doubles = [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x), *threes, *doubles, self.branch_pool(pooled)], dim=1)


class InceptionV3(nn.Module):
    """Features of uint8 images of any size; always in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Unit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Unit(32, 32, 3)
        self.Conv2d_2b_3x3 = Unit(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = Unit(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = BlockA(192, 32), BlockA(256, 64), BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b, self.Mixed_6c = BlockC(768, 128), BlockC(768, 160)
        self.Mixed_6d, self.Mixed_6e = BlockC(768, 160), BlockC(768, 192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b, self.Mixed_7c = BlockE(1280, "average"), BlockE(2048, "maximum")
        self.fc = nn.Linear(2048, CLASSES)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: batch statistics would make a feature depend on the other images."""
        return super().train(False)

    def forward(self, images: Tensor) -> Outputs:
        """(B, 3, h, w) uint8 -> features."""
        x = (tf1_resize(images, SIDE, SIDE) - 128) / 128
        x = max_pool2d(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))), 3, stride=2)
        x = max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        pool = x.mean(dim=(2, 3))
        return Outputs(pool, spatial, pool @ self.fc.weight.T)
