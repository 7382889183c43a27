"""TensorFlow 1's bilinear resize, which torch cannot express: no half-pixel centres, no antialiasing."""

import torch
from torch import Tensor


def tf1_resize(images: Tensor, height: int, width: int) -> Tensor:
    """ResizeBilinear(align_corners=False, half_pixel_centers=False) of (B, C, h, w) -> (B, C, height, width) float32.

    It has no half-pixel centres and no antialiasing, which torch cannot express. Output row i lies at i * h / height in
    float32, between the row below it and the next one, if there is one.
    """
    images = images.float()
    top, bottom, down = _positions(images.shape[2], height, images.device)
    left, right, along = _positions(images.shape[3], width, images.device)
    upper = _blend(images[:, :, top], left, right, along)
    lower = _blend(images[:, :, bottom], left, right, along)
    return upper + (lower - upper) * down[:, None]


def _blend(rows: Tensor, left: Tensor, right: Tensor, weight: Tensor) -> Tensor:
    start = rows[..., left]
    return start + (rows[..., right] - start) * weight


def _positions(size_in: int, size_out: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each output place the two input places and the weight of the second."""
    scale = torch.tensor(size_in, dtype=torch.float32, device=device) / size_out
    at = torch.arange(size_out, dtype=torch.float32, device=device) * scale
    low = at.floor().long()
    return low, (low + 1).clamp(max=size_in - 1), at - low
