"""NiT: image sizes and pixels, packing, and batches of the official code."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks.lpfhp import BestFit, Strategy, assign, costs, fill, lpfhp, pack_meta
from genfound.data.images.pixels import normalised, to_picture
from genfound.data.images.views import ImageViews, center_crop, published_size, resize
from genfound.data.latents.nit import NIT_SCALE, NiTLatents
from genfound.layouts import Packed
from genfound.tokenizers import LatentSpec
from tests.golden.adapters import Results, adapter
from tests.golden.fill import inputs, unit

Fixture = Mapping[str, Any]

WIDTH = 1152
"""Of the network whose costs the benchmark counts."""


@adapter("nit", "nr_resize")
def native_sizes(fixture: Fixture) -> Results:
    """The size to which an image of any size is brought, and that of its latent (stride 32)."""
    smallest, largest = fixture["config"]["min_image_size"], fixture["config"]["max_image_size"]
    rows: list[list[Any]] = []
    for width, height in inputs(fixture)["wh"].tolist():
        new_height, new_width = published_size(height, width, smallest, largest)
        fine = [width, height, new_width, new_height, new_width // 32, new_height // 32]
        thin = [width, height, "error: a side became 0", [new_width, new_height]]
        rows.append(fine if new_height and new_width else thin)
    return {"w_h_neww_newh_latentw_latenth": rows}


def picture(name: str, height: int, width: int) -> Image.Image:
    """The image of a fixture of pixels."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    ramp = np.stack([255 * x / max(width - 1, 1), 255 * y / max(height - 1, 1), 255 * (x + y) / (width + height)], -1)
    noise = unit(name, (height, width, 3)) / math.sqrt(3)
    return Image.fromarray(np.clip(0.7 * ramp + 38 * (noise + 1.0), 0, 255).astype(np.uint8))


@adapter("nit", "resize_pixels")
def pixels(fixture: Fixture) -> Results:
    """Pixels of the native resize, of the centre crop, and of a plain resize."""
    config, asked = fixture["config"], dict(fixture["config"]["args"])
    image = picture(config["image"], config["h"], config["w"])
    if config["op"] == "center_crop_arr":
        out = center_crop(image, asked.pop("image_size"))
    elif config["op"] == "resize_arr":
        out = resize(image, asked.pop("height"), asked.pop("width"), Image.Resampling.BICUBIC)
    elif config["op"] == "native_resolution_resize":
        size = published_size(image.height, image.width, asked.pop("min_image_size"), asked.pop("max_image_size"))
        out = resize(image, *size, Image.Resampling.BICUBIC)
    else:
        raise NotImplementedError(f"unknown operation {config['op']}")
    if asked:
        raise NotImplementedError(f"unknown arguments {sorted(asked)}")
    return {"pixels_hwc_uint8": np.asarray(out), "size_w_h": list(out.size)}


@adapter("nit", "collate")
def collate(fixture: Fixture) -> Results:
    """A pack of latents with patches of one latent pixel."""
    given = inputs(fixture)
    latents = [given[f"latent.{i}"] for i in range(fixture["config"]["images"])]
    batch = Packed(1).to_batch(latents, given["label"])
    sizes = batch.sizes.int()
    return {
        "latent": batch.x[..., None, None],
        "label": batch.y.tolist(),
        "hw_list": sizes.tolist(),
        "hw_list_dtype": str(sizes.dtype),
    }


def strategies(config: Mapping[str, Any], lengths: Sequence[int]) -> list[Strategy]:
    """The packs of the official options."""
    if config["algorithm"] != "LPFHP":
        raise NotImplementedError(f"algorithm {config['algorithm']}")
    return lpfhp(lengths, config["max_seq_len"], config["max_seq_per_pack"])


@adapter("nit", "pack_strategy")
def strategy(fixture: Fixture) -> Results:
    """Lengths of each kind of pack, and how full they are."""
    config, lengths = fixture["config"], inputs(fixture)["lengths"].tolist()
    found = strategies(config, lengths)
    packs, tokens = sum(count for _, count in found), sum(sum(pack) * count for pack, count in found)
    return {
        "strategies_with_counts": [[pack, count] for pack, count in found],
        "packs": packs,
        "packed_tokens": tokens,
        "input_tokens": sum(lengths),
        "mean_fill": float(f"{tokens / (packs * config['max_seq_len']):.7g}"),
    }


@adapter("nit", "pack_indices")
def indices(fixture: Fixture) -> Results:
    """Images of each pack."""
    lengths = inputs(fixture)["lengths"].tolist()
    return {"packs": assign(strategies(fixture["config"], lengths), lengths)}


@adapter("nit", "pack_cli")
def command_line(fixture: Fixture) -> Results:
    """A file of packs for a meta file."""
    config = fixture["config"]
    if config["algorithm"] != "LPFHP":
        raise NotImplementedError(f"algorithm {config['algorithm']}")
    lines = [json.dumps({"latent_h": h, "latent_w": w}) for h, w in inputs(fixture)["latent_hw"].tolist()]
    with tempfile.TemporaryDirectory() as folder:
        meta = Path(folder) / "toy_meta.jsonl"
        meta.write_text("\n".join(lines))
        file = pack_meta(meta, config["max_seq_len"], config["split"])
        return {"file_name": file.name, "packs": json.loads(file.read_text())}


@adapter("nit", "packing_benchmark")
def benchmark(fixture: Fixture) -> Results:
    """How full the packs of the official algorithm are, and those of greedy best fit, without the last one."""
    config, lengths = fixture["config"], inputs(fixture)["lengths"].tolist()
    budget = config["max_seq_len"]
    official = [pack for pack, count in lpfhp(lengths, budget, budget) for _ in range(count)]
    source = BestFit(lambda k: lengths[k] if k < len(lengths) else budget + 1, budget, budget, config["lookahead"])
    streamed: list[list[int]] = []
    left = len(lengths)
    while left:
        positions = [k for k in source.take() if k < len(lengths)]
        streamed.append([lengths[k] for k in positions])
        left -= len(positions)
    return {"official_LPFHP": summary(official, budget), "streaming_best_fit": summary(streamed[:-1], budget)}


def summary(packs: Sequence[Sequence[int]], budget: int) -> dict[str, float]:
    """Fill, images and spread of the cost of packs, in the digits of the fixture."""
    share, cost = fill(packs, budget), costs(packs, WIDTH)
    return {
        "packs": len(packs),
        "mean_fill": float(f"{share.mean():.7g}"),
        "min_fill": float(f"{share.min():.7g}"),
        "images_per_pack_min": min(map(len, packs)),
        "images_per_pack_max": max(map(len, packs)),
        "cost_cv": float(f"{cost.std() / cost.mean():.4g}"),
    }


@adapter("nit", "dataset_item")
def dataset_item(fixture: Fixture) -> Results:
    """A stored latent and its label, mirrored or not, as they were stored, and the image at half its resolution."""
    config = fixture["config"]
    square = config["type"] != "native-resolution"
    image = picture(config["image"], config["h"], config["w"])
    height, width = 16 * config["latent_h"], 16 * config["latent_w"]
    small = center_crop(image, height) if square else resize(image, height, width, Image.Resampling.BICUBIC)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        write(config, Path(folder))
        side = int(config["type"].rpartition("x")[2]) if square else 32
        views = ImageViews("square" if square else "native", side, 32, 4096)
        source = NiTLatents(Path(folder), views, None, "train", True, LatentSpec(32, 32))
        for flip in (0, 1):
            label = torch.tensor(float(source.labels[0]))
            results |= {
                f"image.flip{flip}": normalised(to_picture(np.asarray(small), bool(flip))),
                f"latent.flip{flip}": source.moments(0, bool(flip)) * NIT_SCALE,
                f"label.flip{flip}": label.item(),
                f"label_dtype.flip{flip}": str(label.dtype),
            }
    return results


def write(config: Mapping[str, Any], root: Path) -> None:
    """The files of one image as NiT publishes them."""
    size = (config["latent_h"], config["latent_w"])
    file = root / f"latents-{config['type'].removeprefix('fixed-')}" / "n0/a.safetensors"
    file.parent.mkdir(parents=True)
    stored = torch.from_numpy(unit("latent", (2, 32, *size)))
    save_file({"latent": stored, "label": torch.tensor(float(config["label"]))}, file)
    meta = {"latent_file": "n0/a.safetensors", "latent_h": size[0], "latent_w": size[1], "type": config["type"]}
    (root / "a_meta.jsonl").write_text(json.dumps(meta))
