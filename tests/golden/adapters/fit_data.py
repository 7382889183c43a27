"""FiT: image sizes and pixels, and padded batches of the official code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from genfound.batch import Batch
from genfound.data.images.views import Entries, ImageViews, center_crop, published_flexible_size, resized
from genfound.layers.tokens import coordinates, from_tokens
from genfound.layouts import Padded
from tests.golden.adapters import Results, adapter
from tests.golden.fill import inputs, unit

Fixture = Mapping[str, Any]

PATCH = 2


@adapter("fit", "resize_sizes")
def sizes(fixture: Fixture) -> Results:
    """The size to which an image is brought, and its tokens, for several targets."""
    unit_side = fixture["config"]["vq_vae_down"] * fixture["config"]["patch_size"]
    results = {}
    for target, entry in fixture["outputs"].items():
        rows = []
        for width, height, *_ in entry["values"]:
            new_height, new_width = published_flexible_size(height, width, unit_side, int(target))
            rows.append([width, height, new_width, new_height, new_width // unit_side * (new_height // unit_side)])
        results[target] = rows
    return results


@adapter("fit", "resize_pixels")
def pixels(fixture: Fixture) -> Results:
    """Pixels of the resize in units of 16 pixels, and of the centre crop."""
    noise = inputs(fixture)["image"].numpy()
    image = Image.fromarray(np.clip(50 * noise + 128, 0, 255).astype(np.uint8))
    size = published_flexible_size(image.height, image.width, 16, fixture["config"]["S"])
    return {
        "resize": np.asarray(resized(image, *size)),
        "crop": np.asarray(center_crop(image, fixture["config"]["C"])),
    }


@adapter("fit", "collate", notes=("choices",))
def collate(fixture: Fixture) -> Results:
    """Padded batches of stored latents: which of an image's views, which mirror image, and where each token is."""
    target, given = fixture["config"]["target_len"], fixture["inputs"]
    files = sorted(file for file in given["files"] if not file[1].startswith("less_than"))
    names = sorted({name for name, *_ in files})
    views = ImageViews("flexible", 16, 16, target)
    rules = [1 if bucket.endswith("_crop") else 0 for _, bucket, *_ in files]
    entries = Entries(
        np.array([names.index(name) for name, *_ in files]),
        np.array(rules),
        np.array([size for _, _, size, _ in files]),
    )
    resized, cropped = views.items(entries).reshape(2, -1)
    results: dict[str, Any] = {}
    for mode, chosen in (("resize", resized), ("crop", cropped)):
        variant = int(given["coin"][mode] >= 0.5)
        batch = to_batch([files[i] for i in chosen], variant, target)
        results |= {f"{mode}.{key}": value for key, value in official(batch).items()}
    return results


def to_batch(files: list[Any], variant: int, target: int) -> Batch:
    """Stored tokens (h, w, 16) of one variant of each file, as latents in a padded batch."""
    latents = []
    for name, bucket, (rows, columns), _ in files:
        feature = torch.from_numpy(unit(f"feature.{bucket}.{name}", (2, rows, columns, 16)))[variant]
        latents.append(from_tokens(feature.reshape(rows * columns, 16), rows, PATCH))
    return Padded(PATCH, target).to_batch(latents, torch.tensor([label for *_, label in files]))


def official(batch: Batch) -> dict[str, Any]:
    """What the official loader says of a padded batch: column before row, zeros where there is nothing."""
    assert batch.mask is not None
    grid: Tensor = coordinates(batch, PATCH).flip(-1).transpose(1, 2) * batch.mask[:, None]
    return {
        "feature": batch.x,
        "grid": grid.float(),
        "mask": batch.mask.to(torch.uint8),
        "label": batch.y[:, None],
        "size": batch.sizes[:, None].int(),
        "n_batch": int(batch.tokens.max()),
    }
