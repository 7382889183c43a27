"""What several tests build."""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from genfound import build
from genfound.backbones.base import Backbone
from genfound.backbones.nit import NiT
from genfound.batch import Batch
from genfound.config import compose
from genfound.data.images.views import VIEW_KEYS, ImageViews
from genfound.layouts import Dense, Packed, Padded
from genfound.modules.base import GenerativeModule, module_class
from genfound.objectives.base import GuidanceOf, Net, Objective
from genfound.objectives.flow import Flow
from genfound.runtime import checkpoint_io, run_directory
from genfound.samplers import Sampler
from genfound.tokenizers import LatentSpec

SAMPLERS = {
    name: pkgutil.resolve_name(compose.read_option("sampler", name)["_target_"])
    for name in compose.option_names("sampler")
}


def times_of(name: str, objective: Objective, steps: int | str) -> Tensor:
    """The times that a sampler walks."""
    times: Tensor = objective.times(steps, SAMPLERS[name].needs)
    return times


def sampler_of(name: str, **options: Any) -> Sampler:
    """An option of the group, with other options."""
    return build.sampler({"sampler": compose.fill_option("sampler", {"name": name, **options})})


def guidance_of(name: str, **options: Any) -> GuidanceOf | None:
    """An option of the group, with other options."""
    return build.guidance({"guidance": compose.fill_option("guidance", {"name": name, **options})})


def at_one_time(net: Callable[[Batch, float], Tensor]) -> Net:
    """A network of which all images are at the same time, that takes it as a number."""
    return lambda batch, t: net(batch, t[0].item())


def latents(sizes: Sequence[tuple[int, int]], channels: int = 4, seed: int = 0) -> list[Tensor]:
    """Standard normal latents (C, h, w) of the given sizes."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(channels, h, w, generator=generator) for h, w in sizes]


def packed(sizes: Sequence[tuple[int, int]], channels: int = 4, patch_size: int = 1, **options: Any) -> Batch:
    """A packed batch of random latents whose labels are 0, 1, 2, ..."""
    return Packed(patch_size, **options).to_batch(latents(sizes, channels), torch.arange(len(sizes)))


def three_layouts(sizes: Sequence[tuple[int, int]], patch_size: int = 1) -> dict[str, Batch]:
    """The same latents in every layout that can hold them."""
    z, y = latents(sizes), torch.arange(len(sizes))
    longest = max(h * w for h, w in sizes) // patch_size**2
    layouts = [Padded(patch_size), Padded(patch_size, longest + 3), Packed(patch_size), Packed(patch_size, 200, 12)]
    if len(set(sizes)) == 1:
        layouts.append(Dense(patch_size))
    return {f"{layout.name}{i}": layout.to_batch(z, y) for i, layout in enumerate(layouts)}


def fresh_nit(channels: int = 4, num_classes: int = 10, seed: int = 0, **options: Any) -> NiT:
    """A NiT of two small blocks, or of other options, as it is initialised."""
    config = composed("model=nit_s")
    model = {**config["model"], "width": 32, "depth": 2, "heads": 2, "attention": "loop", **options}
    net = build.net({**config, "model": model, "seed": seed}, LatentSpec(channels, 1), num_classes)
    assert isinstance(net, NiT)
    return net


def small_nit(**options: Any) -> NiT:
    """A NiT of two small blocks whose weights are all random, also those that start at zero."""
    return randomise(fresh_nit(**options))


def training_module(net: Backbone, weight: str = "image", **options: Any) -> GenerativeModule:
    """What trains a network on noise-free shapes of the linear path."""
    defaults: dict[str, Any] = {
        "objective": linear_flow(weight=weight), "optimizer": {}, "label_drop": 0.0, "seed": 0, "budget": 100,
    }  # fmt: skip
    return module_class(type(net))(net, **{**defaults, **options})


ALIGNED = [
    "alignment=repa", "alignment.depth=1", "alignment.hidden=16", "alignment.teachers.dinov2.weights=random_tiny",
    "alignment.teachers.dinov2.width=32",
]  # fmt: skip
"""Overrides of an alignment to a small random teacher."""


def linear_flow(**options: Any) -> Flow:
    """Flow matching on the linear path."""
    defaults: dict[str, Any] = {
        "path": "linear", "prediction": "velocity", "weighting": "none", "min_snr_gamma": 5.0,
        "time": "logit_normal", "time_mean": 0.0, "time_std": 1.0, "time_window": None, "time_window_share": 1.0,
        "time_shift": 1.0,
        "train_eps": None, "sample_eps": None, "directional": 0.0, "weight": "image",
    }  # fmt: skip
    return Flow(**{**defaults, **options})


def randomise(net: NiT, seed: int = 0) -> NiT:
    """Draw every parameter anew, so that no branch is switched off."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in net.named_parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
        if "norm.weight" in name:
            parameter.data += 1
    return net


def loss_and_gradients(net: Backbone, batch: Batch, t: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of squares of the output, with the network's own losses, and its gradient for every parameter."""
    net.zero_grad()
    loss = batch.per_image(net(batch, t) ** 2).sum() + sum(training_module(net).extra_losses().values())
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def assert_equal_gradients(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Equal to a tolerance that is relative to the largest value of each parameter's gradient."""
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(gradient, expected[name], atol=tolerance * scale, rtol=0, msg=name)


def with_views(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a source of image files, with its views in place of the keys of `data` that say what they are."""
    kept = {key: value for key, value in options.items() if key not in (*VIEW_KEYS, "unit")}
    return {**kept, "views": ImageViews.of(options, options["unit"])}


@functools.cache
def _composed(name: str, overrides: tuple[str, ...]) -> DictConfig:
    with hydra.initialize_config_dir(compose.config_dir(), version_base="1.3"):
        return hydra.compose(name, overrides=list(overrides))


def composed(*overrides: str, name: str = "train", resolve: bool = True) -> dict[str, Any]:
    """A configuration as the command line would compose it."""
    return compose.to_dict(_composed(name, overrides), resolve)


def run_dir(folder: Path, *overrides: str) -> Path:
    """A run directory that `genfound.training.fit` can train."""
    run_directory.write_config(folder, compose.compose("train", overrides), allow_changes=False)
    return folder


def state_differences(one: Path, other: Path) -> list[str]:
    """Where the newest checkpoints of two runs are not the same bit by bit, but for Lightning's counts of epochs."""
    states = [dict(checkpoint_io.read(checkpoint_io.newest(run / "checkpoints"))) for run in (one, other)]
    for state in states:
        del state["epoch"], state["loops"]
        assert state["ema"] and state["optimizer_states"]
    return differences(*states)


def differences(one: Any, other: Any, key: str = "") -> list[str]:
    """Dotted keys at which two checkpoints are not the same, bit by bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = sorted(one.keys() | other.keys(), key=str)
        return [found for k in keys for found in differences(one.get(k), other.get(k), f"{key}.{k}".lstrip("."))]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [found for i, (a, b) in pairs for found in differences(a, b, f"{key}.{i}")]
    same = torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one == other
    return [] if same else [key]
