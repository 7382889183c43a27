from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genfound.tokenizers import PixelTokenizer
from genfound.tokenizers.autoencoder import Autoencoder
from genfound.tokenizers.dc_ae import DCAE
from genfound.tokenizers.sd_vae import SDVAE
from genfound.tokenizers.vq_f4 import VQF4
from tests.helpers import composed

OPTIONS: dict[str, Any] = {"weights": "random_tiny", "precision": "fp32", "pixels_per_call": 2**20}
SPECS = {"sd_vae": (4, 8, 0.18215), "dc_ae": (32, 32, 0.41407), "vq_f4": (3, 4, 1.0)}
NAMES = list(SPECS)


def build(name: str, **options: Any) -> Autoencoder:
    if name == "sd_vae":
        return SDVAE(**{"posterior": "sample", **OPTIONS, **options})
    return {"dc_ae": DCAE, "vq_f4": VQF4}[name](**{**OPTIONS, **options})


def images(count: int = 2, height: int = 64, width: int = 96) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("name", NAMES)
def test_shapes_follow_from_the_spec_at_any_aspect_ratio(name: str) -> None:
    codec = build(name)
    channels, stride, scale = SPECS[name]
    assert codec.spec == (channels, stride)
    assert codec.scale == scale
    assert codec.online
    latents = codec.encode(images())
    assert latents.shape == (2, channels, 64 // stride, 96 // stride)
    decoded = codec.decode(latents)
    assert decoded.shape == (2, 3, 64, 96)
    assert latents.dtype == decoded.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "parameters", "keys"), [("sd_vae", 83.65, 248), ("dc_ae", 312.25, 375), ("vq_f4", 55.32, 205)]
)
def test_random_weights_have_the_official_architecture(name: str, parameters: float, keys: int) -> None:
    kind = {"sd_vae": SDVAE, "dc_ae": DCAE, "vq_f4": VQF4}[name].kind
    with torch.device("meta"):
        model = getattr(importlib.import_module("diffusers"), kind.name)(**kind.official)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == parameters
    assert len(model.state_dict()) == keys
    assert model.config["scaling_factor"] == SPECS[name][2]


@pytest.mark.parametrize("name", NAMES)
def test_the_configuration_builds_it(name: str) -> None:
    options = composed(f"tokenizer={name}", "tokenizer.weights=random_tiny")["tokenizer"]
    module, _, target = options.pop("_target_").rpartition(".")
    codec = getattr(importlib.import_module(module), target)(**options)
    assert codec.spec == SPECS[name][:2]


@pytest.mark.parametrize("name", NAMES)
def test_latents_are_scaled_moments(name: str) -> None:
    codec = build(name)
    moments = codec.moments(images())
    mean = moments.chunk(2, dim=1)[0] if codec.stochastic else moments
    assert torch.equal(codec.encode(images()), mean * SPECS[name][2])
    assert torch.equal(codec.normalise(moments), codec.encode(images()))


def test_the_posterior_is_drawn_with_the_given_noise_only() -> None:
    codec = build("sd_vae")
    assert codec.stochastic
    assert not build("sd_vae", posterior="mode").stochastic
    mean, logvar = codec.moments(images()).chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    drawn = codec.encode(images(), noise)
    assert torch.allclose(drawn, (mean + (0.5 * logvar).exp() * noise) * 0.18215, rtol=0, atol=1e-7)
    assert torch.equal(codec.encode(images(), noise), drawn)
    assert torch.equal(codec.encode(images(), torch.zeros_like(noise)), codec.encode(images()))


def test_the_log_variance_is_clamped_before_it_is_stored() -> None:
    codec = build("sd_vae")
    nn.init.constant_(codec.model.quant_conv.bias[4:], 100.0)
    assert (codec.moments(images())[:, 4:] == 20).all()


@pytest.mark.parametrize("name", NAMES)
def test_groups_bound_a_call_and_change_nothing(name: str) -> None:
    whole, split = build(name), build(name, pixels_per_call=2 * 64 * 96)
    counts: list[int] = []
    encode, decode = split.model.encode, split.model.decode
    split.model.encode = lambda x: (counts.append(len(x)), encode(x))[1]
    split.model.decode = lambda x: (counts.append(len(x)), decode(x))[1]
    x = images(5)
    latents = split.encode(x)
    assert torch.allclose(latents, whole.encode(x), rtol=0, atol=2e-5 * float(latents.abs().max()))
    decoded = split.decode(latents)
    assert torch.allclose(decoded, whole.decode(latents), rtol=0, atol=2e-5 * float(decoded.abs().max()))
    assert counts == [2, 2, 1, 2, 2, 1]


def test_an_image_larger_than_a_group_goes_alone() -> None:
    codec = build("sd_vae", pixels_per_call=1)
    assert codec.decode(codec.encode(images(3, 16, 24))).shape == (3, 3, 16, 24)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_frozen_and_its_latents_can_be_trained_on(name: str) -> None:
    codec = build(name)
    before = {key: value.clone() for key, value in codec.model.state_dict().items()}
    latents = codec.encode(images())
    assert not latents.requires_grad
    assert not latents.is_inference()
    layer = nn.Linear(latents.shape[-1], 4)
    layer(latents).sum().backward()
    assert layer.weight.grad is not None
    decoded = codec.decode(latents)
    assert not decoded.is_inference()
    assert not codec.model.training
    assert not any(p.requires_grad for p in codec.model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in codec.model.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_an_outer_autocast_does_not_reach_the_network(name: str) -> None:
    codec = build(name)
    latents = codec.encode(images())
    decoded = codec.decode(latents)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codec.encode(images()), latents)
        assert torch.equal(codec.decode(latents), decoded)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_is_close_and_gives_float32(name: str) -> None:
    exact, rough = build(name), build(name, precision="bf16")
    latents = rough.encode(images())
    assert latents.dtype == torch.float32
    difference = (latents - exact.encode(images())).abs()
    assert 0 < float(difference.mean()) < 0.05 * float(latents.abs().mean())
    assert rough.decode(latents).dtype == torch.float32


def test_random_weights_are_always_the_same_and_draw_nothing() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, two = build("dc_ae"), build("dc_ae")
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one.encode(images()), two.encode(images()))


@pytest.mark.parametrize(("name", "height"), [("sd_vae", 44), ("dc_ae", 48), ("vq_f4", 42)])
def test_a_size_that_does_not_divide_is_refused(name: str, height: int) -> None:
    with pytest.raises(ValueError, match=rf"an image of {height} x 96 pixels does not divide by {SPECS[name][1]}"):
        build(name).encode(images(1, height))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp16"}, r"tokenizer\.precision=fp16 is unknown; choose fp32 or bf16"),
        ({"posterior": "mean"}, r"tokenizer\.posterior=mean is unknown; choose sample or mode"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("sd_vae", **options)


def test_pixels_are_encoded_by_the_workers() -> None:
    codec = PixelTokenizer()
    assert not codec.online
    assert not codec.stochastic
    assert torch.equal(codec.decode(codec.encode(images())), images())


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_the_network_follows_its_input_to_the_device(name: str) -> None:
    codec = build(name)
    here = codec.encode(images())
    there = codec.encode(images().cuda())
    assert there.is_cuda
    assert torch.allclose(here, there.cpu(), rtol=0, atol=1e-2 * float(here.abs().max()))
    assert codec.decode(there).is_cuda
