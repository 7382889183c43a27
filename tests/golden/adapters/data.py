"""Images: the centre crop on which published data sets were made, and decoded images as bytes."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from genfound.data.images import views
from genfound.data.images.pixels import normalised, to_picture, to_uint8
from tests.golden.adapters import Results, adapter
from tests.golden.fill import inputs, unit


def picture(name: str, shape: tuple[int, int, int]) -> np.ndarray:
    """The image of a fixture, (height, width, 3) uint8."""
    y, x, c = np.ogrid[: shape[0], : shape[1], : shape[2]]
    noise = np.floor((unit(name, shape) + np.float32(2)) * np.float32(32)).astype(np.int64)
    return ((noise + 5 * x + 3 * y + 40 * c) % 256).astype(np.uint8)


@adapter("data", "center_crop", notes=("tolerance", "crc32_pillow_13_single_call"))
def center_crop(fixture: Mapping[str, Any]) -> Results:
    """The crop with its intermediate sizes; all pixels by their checksum."""
    entry = fixture["inputs"]["image"]
    image = picture(entry["fill"], tuple(entry["shape"]))
    assert image.ravel()[:16].tolist() == entry["first_16"]
    assert zlib.crc32(image.tobytes()) == entry["crc32"]
    resized: list[tuple[Image.Resampling, tuple[int, int]]] = []
    cropped: list[tuple[int, int, int, int]] = []
    resize, crop = views.resize, Image.Image.crop

    def spy_resize(picture: Image.Image, height: int, width: int, method: Image.Resampling) -> Image.Image:
        resized.append((method, (width, height)))
        return resize(picture, height, width, method)

    def spy_crop(picture: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
        cropped.append(box)
        return crop(picture, box)

    with mock.patch.object(views, "resize", spy_resize), mock.patch.object(Image.Image, "crop", spy_crop):
        pixels = np.asarray(views.center_crop(Image.fromarray(image), fixture["config"]["image_size"]))
    *boxes, (method, bicubic) = resized
    assert method == Image.Resampling.BICUBIC
    assert all(method == Image.Resampling.BOX for method, _ in boxes)
    scaled = normalised(to_picture(pixels)).permute(1, 2, 0)
    return {
        "box_sizes_wh": [list(size) for _, size in boxes],
        "bicubic_size_wh": list(bicubic),
        "crop_x": cropped[0][0],
        "crop_y": cropped[0][1],
        "shape": list(pixels.shape),
        "crc32": zlib.crc32(pixels.tobytes()),
        "first_64": pixels.ravel()[:64].tolist(),
        "mean": float(pixels.mean()),
        "normalized_first_8": scaled.flatten()[:8],
    }


@adapter("dit", "data.to_uint8")
def decoded_bytes(fixture: Mapping[str, Any]) -> Results:
    """Images (B, 3, H, W) in about [-1, 1] as bytes (B, H, W, 3)."""
    return {"out": np.stack([to_uint8(image) for image in inputs(fixture)["decoded"]])}


@adapter("nit", "latents_to_uint8")
def truncated_bytes(fixture: Mapping[str, Any]) -> Results:
    """Images (B, 3, H, W) in about [-1, 1] as bytes (B, H, W, 3), rounded down."""
    pixels = [to_uint8(image, "truncate") for image in inputs(fixture)["decoded"]]
    return {"pixels": np.stack(pixels).ravel().tolist()}
