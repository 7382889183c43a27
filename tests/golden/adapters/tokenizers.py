"""Autoencoders: official weights in a folder, loaded as a user would, against the official encoder and decoder."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from genfound.tokenizers.autoencoder import Autoencoder
from genfound.tokenizers.base import LatentSpec
from genfound.tokenizers.dc_ae import DCAE
from genfound.tokenizers.sd_vae import SDVAE
from genfound.tokenizers.vq_f4 import VQF4
from genfound.tokenizers.weights import CONFIG, WEIGHTS
from tests.golden.adapters import Results, adapter
from tests.golden.fill import inputs, parameters, tensor, unit

BATCH_NORM = {"running_mean": torch.zeros, "running_var": torch.ones, "num_batches_tracked": torch.zeros}


def write(fixture: Mapping[str, Any], folder: Path) -> None:
    """The config and the weights of a fixture as diffusers stores them."""
    config = dict(fixture["config"])
    (folder / CONFIG).write_text(json.dumps({"_class_name": config.pop("class"), **config}))
    buffers = {}
    for key, shape in fixture["buffers"]:
        name = key.rpartition(".")[2]
        dtype = torch.int64 if name == "num_batches_tracked" else torch.float32
        buffers[key] = BATCH_NORM[name](shape, dtype=dtype)
    save_file({**parameters(fixture), **buffers}, folder / WEIGHTS)


def tokenizer(fixture: Mapping[str, Any]) -> Autoencoder:
    """The tokenizer that takes the class of a fixture."""
    options = {"precision": "fp32", "pixels_per_call": 2**20}
    with tempfile.TemporaryDirectory() as folder:
        write(fixture, Path(folder))
        official = fixture["config"]["class"]
        if official == "AutoencoderKL":
            return SDVAE(weights=folder, posterior="sample", **options)
        if official == "AutoencoderDC":
            return DCAE(weights=folder, **options)
        if official == "VQModel":
            return VQF4(weights=folder, **options)
    raise NotImplementedError(f"autoencoders of class {official}")


def image(entry: Mapping[str, Any]) -> Tensor:
    """The input, which may be divided."""
    plain = {key: value for key, value in entry.items() if key != "divide_by"}
    return tensor(plain) / entry.get("divide_by", 1)


@adapter("tokenizers", "autoencoder", notes=("code_indices",))
@torch.no_grad()
def autoencoder(fixture: Mapping[str, Any]) -> Results:
    """Moments, latents and decoded images; of the codes only the first ones are given, and checked here."""
    codec = tokenizer(fixture)
    images = image(fixture["inputs"]["image"])
    moments, mode = codec.moments(images), codec.encode(images)
    assert list(mode.shape[1:]) == [codec.spec.channels, *(side // codec.spec.stride for side in images.shape[2:])]
    results = {"latent_mode": mode, "decoded": codec.decode(mode)}
    if codec.stochastic:
        mean, logvar = moments.chunk(2, dim=1)
        noise = torch.from_numpy(unit("noise.0", mode.shape))
        results |= {"posterior_mean": mean, "posterior_logvar": logvar, "latent_sample": codec.encode(images, noise)}
    if isinstance(codec, VQF4):
        codes = codec.model.quantize(moments)[2][2].flatten()
        given = fixture["outputs"]["code_indices"]
        assert list(codes.shape) == given["shape"]
        assert codes[: len(given["values"])].tolist() == given["values"]
        results["decoded_without_quantization"] = codec.model.decode(moments, force_not_quantize=True).sample
    return results


class Doubling(DCAE):
    """A stand-in for the network, which doubles to encode and trebles to decode."""

    def __init__(self, scale: float) -> None:
        super().__init__(weights="random_tiny", precision="fp32", pixels_per_call=2**20)
        self.spec, self.scale = LatentSpec(3, 1), scale

    def _moments(self, images: Tensor) -> Tensor:
        return 2 * images

    def _decode(self, latents: Tensor) -> Tensor:
        return 3 * latents


@adapter("nit", "vae_scale")
def scaling(fixture: Mapping[str, Any]) -> Results:
    """Where the scale goes; slicing, which the official code may switch on, changes no number."""
    codec, given = Doubling(fixture["config"]["scaling_factor"]), inputs(fixture)
    return {"latent": codec.encode(given["image"]), "image": codec.decode(given["z"])}
