"""Sampling: from labels and sizes to images.

Image k of a request depends on (seed, k, its label, its size) and on nothing else: its noise is its own, and
the network always sees a full micro-batch of images of one size, padded with copies where needed, because
matrix kernels differ in the last bit with the number of rows. The experts of DiT-MoE are the exception: how many
rows one of them sees depends on the other images of the call, so its images agree to rounding only.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from genfound import build, samplers
from genfound.backbones.base import Backbone
from genfound.batch import Batch
from genfound.checkpoints.load import LoadedModel, load
from genfound.config import compose
from genfound.config.checks import image_sizes, integer, one_of
from genfound.config.targets import trusted
from genfound.data.images.pixels import to_uint8
from genfound.layouts import Layout
from genfound.objectives.base import GuidedNet, Objective
from genfound.rng import Rng
from genfound.runtime import devices
from genfound.runtime.progress import Progress, no_progress
from genfound.samplers import SAMPLERS
from genfound.samplers.guidance import AutoGuidance, ClassifierFreeGuidance, unguided
from genfound.sampling.requests import SampleRequest, _chunks, check_size, make_requests
from genfound.tokenizers import Tokenizer, Undecodable

Drawn = TypeVar("Drawn")


@dataclass(frozen=True)
class Pipeline:
    """How to sample from a network.

    Attributes:
        objective: what the network was trained for.
        tokenizer: decodes latents.
        layout: without a budget of tokens.
        sampler: `{name, steps}`.
        guidance: `{name, ...}`; name `none`, `cfg` or `autoguidance`, and the options of its class.
        micro_batch: images per network call.
        precision: `bf16-mixed` or `32-true`.
        uint8: how decoded values become bytes, `round` or `truncate`.
        device: where the network is.
        weak: the weaker network of autoguidance.
    """

    objective: Objective
    tokenizer: Tokenizer
    layout: Layout
    sampler: Mapping[str, Any]
    guidance: Mapping[str, Any]
    micro_batch: int
    precision: str
    uint8: str
    device: torch.device
    weak: Backbone | None = None

    @classmethod
    def of(
        cls,
        config: Mapping[str, Any],
        objective: Objective,
        tokenizer: Tokenizer,
        device: torch.device,
        micro_batch: int,
    ) -> Pipeline:
        """Layout, sampler, guidance and precision of a configuration.

        Raises:
            ValueError: an option that does not exist, or a weaker network that does not fit.
        """
        guidance = complete("guidance", config["guidance"])
        weak = _load_guide(guidance["weights"], objective, trusted(config)) if "weights" in guidance else None
        return cls(
            objective=objective,
            tokenizer=tokenizer,
            layout=build.sampling_layout(config),
            sampler=complete("sampler", config["sampler"]),
            guidance=guidance,
            micro_batch=micro_batch,
            precision=devices.precision(config["trainer"]["precision"], device),
            uint8=config["sample"]["uint8"],
            device=device,
            weak=None if weak is None else weak.to(device),
        )

    def check(self, net: Backbone) -> None:
        """Raise a ValueError if this network cannot be sampled from so; costs nothing."""
        samplers.check(self.sampler)
        self.objective.times(self.sampler["name"], self.sampler["steps"])
        with_guidance(net, self.guidance, self.objective.time_range, self.weak)

    @property
    def rows(self) -> int:
        """Images of a network call: one where the steps of an adaptive sampler would couple them."""
        return 1 if self.sampler.get("norm") == "image" else self.micro_batch

    def draw(
        self, net: Backbone, requests: Sequence[SampleRequest], seed: int, progress: Progress = no_progress
    ) -> list[np.ndarray]:
        """Images (height, width, 3) uint8 in the order of the requests; see `latents`.

        `progress` is called after each step too, with a share of the images that are under way.

        Raises:
            ValueError: a size that does not divide into tokens, or a tokenizer that cannot decode.
        """
        return self._each(net, requests, seed, self._decode, progress)

    def latents(self, net: Backbone, requests: Sequence[SampleRequest], seed: int) -> list[Tensor]:
        """Latents (C, h, w) in the order of the requests.

        Args:
            net: backbone in eval mode.
            requests: what to draw.
            seed: seed of all noise.

        Raises:
            ValueError: a size that does not divide into tokens.
        """
        return self._each(net, requests, seed, lambda z: z, no_progress)

    def _each(
        self,
        net: Backbone,
        requests: Sequence[SampleRequest],
        seed: int,
        finish: Callable[[Tensor], Drawn],
        progress: Progress,
    ) -> list[Drawn]:
        """What `finish` makes of each latent."""
        for size in {request.size for request in requests}:
            check_size(size, self.tokenizer.spec.stride * self.layout.patch_size)
        self.check(net)
        progress(0, len(requests))
        images: dict[int, Drawn] = {}
        by_size = sorted(enumerate(requests), key=lambda pair: pair[1].size)
        for _, same in itertools.groupby(by_size, key=lambda pair: pair[1].size):
            for chunk in _chunks(list(same), self.rows):
                before, count = len(images), len(chunk)

                def under_way(share: float, before: int = before, count: int = count) -> None:
                    progress(before + count * share, len(requests))

                latents = self._latents(net, [request for _, request in chunk], seed, under_way)
                for (place, _), z in zip(chunk, latents, strict=True):
                    images[place] = finish(z)
                progress(len(images), len(requests))
        return [images[place] for place in range(len(requests))]

    @torch.no_grad()
    def _decode(self, latent: Tensor) -> np.ndarray:
        return to_uint8(self.tokenizer.decode(latent[None])[0], self.uint8)

    @torch.no_grad()
    def _latents(
        self, net: Backbone, requests: list[SampleRequest], seed: int, under_way: Callable[[float], None]
    ) -> list[Tensor]:
        """Latents (C, h, w) of up to `micro_batch` images of one size."""
        channels, stride = self.tokenizer.spec
        padded = requests + [requests[-1]] * (self.rows - len(requests))
        noise = [
            Rng(seed, "sample", r.number).normal("noise", (channels, r.size[0] // stride, r.size[1] // stride))
            for r in padded
        ]
        labels = torch.tensor([r.label for r in padded])
        copies = 2 if self.guidance.get("doubled") and self.guidance["scale"] != 1 else 1
        if copies == 2:
            labels = torch.cat([labels, torch.full_like(labels, net.null_label or 0)])
        batch = self.layout.to_batch(noise * copies, labels).to(self.device)
        times = self.objective.times(self.sampler["name"], self.sampler["steps"])
        rng = PerImageNoise(seed, padded * copies, self.layout, noise)
        field = self.objective.field(with_guidance(net, self.guidance, self.objective.time_range, self.weak))
        options = {key: value for key, value in self.sampler.items() if key not in ("name", "steps")}
        sampler: Callable[..., Batch] = functools.partial(SAMPLERS[self.sampler["name"]], **options)

        def stepped(step: int, _: Batch) -> None:
            under_way((step + 1) / (len(times) + 1))

        # An adaptive sampler would keep the states at all times for this, and show them at its end.
        each = None if samplers.adapts(self.sampler) else stepped
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16-mixed"):
            batch = sampler(field, batch, times, rng, each)
        real = torch.arange(len(labels), device=self.device) < len(requests)
        if not batch.x.isfinite().all():
            raise FloatingPointError(
                "an image is not finite: the network or its steps diverge; try guidance=none, more sampler.steps "
                "or precision=fp32"
            )
        return self.layout.to_latents(batch.x, replace(batch, real=real))


class PerImageNoise:
    """Step noise of a micro-batch: each image draws its own, as a latent, whatever the layout."""

    def __init__(self, seed: int, requests: Sequence[SampleRequest], layout: Layout, latents: Sequence[Tensor]) -> None:
        self.streams = [Rng(seed, "sample", request.number) for request in requests]
        self.layout = layout
        self.shape = latents[0].shape

    def normal(self, step: int) -> Tensor:
        """Standard normal numbers of a step, shaped like the batch, on the host."""
        drawn = [stream.at(step).normal("step_noise", self.shape) for stream in self.streams]
        return self.layout.to_batch(drawn, torch.zeros(len(drawn), dtype=torch.long)).x


def _load_guide(weights: str, objective: Objective, trust: Sequence[str]) -> Backbone:
    """The other network of autoguidance.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it cannot be loaded, or was trained to predict something else.
    """
    try:
        other = load(weights, trust=trust)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"guidance.weights={weights}: {error}") from None
    for key, value in objective.outputs.items():
        found = other.objective.outputs.get(key, f"that of {other.objective.name}")
        if found != value:
            raise ValueError(f"guidance.weights={weights} has another {key}: {found} there, {value} here")
    return other.net


def with_guidance(
    net: Backbone,
    guidance: Mapping[str, Any],
    time_range: tuple[float, float] = (0.0, 1.0),
    weak: Backbone | None = None,
) -> GuidedNet:
    """The network with its guidance, at times of an objective; `weak` is the other network of autoguidance."""
    options = {key: value for key, value in guidance.items() if key not in ("name", "weights")}
    if one_of("guidance", guidance["name"], ("none", "cfg", "autoguidance")) == "none":
        return unguided(net)
    if weak is not None:
        return AutoGuidance(net, weak, **options, time_range=time_range)
    return ClassifierFreeGuidance(net, **options, time_range=time_range)


def sample(
    loaded: LoadedModel,
    labels: int | str | Sequence[int | str],
    size: tuple[int, int] | None = None,
    n: int = 1,
    sampler: str | Mapping[str, Any] | None = None,
    guidance: float | Mapping[str, Any] | None = None,
    seed: int = 0,
    batch: int = 16,
    precision: str | None = None,
) -> np.ndarray | Tensor:
    """Images of the given labels, or their latents where the tokenizer is absent.

    Args:
        loaded: what `genfound.load` returned.
        labels: class numbers or names; a number that is the name of a class is this class.
        size: (height, width) in pixels; `None` is the most typical size of the training data.
        n: images per label.
        sampler: a name, or all options; `None` is the run's own.
        guidance: a scale, or all options; `None` is the run's own.
        seed: seed of all noise.
        batch: images per network call.
        precision: `auto`, `bf16` or `fp32`; `None` is the run's own.

    Returns:
        (len(labels) * n, height, width, 3) uint8, or latents (len(labels) * n, C, h, w).

    Raises:
        ValueError: a label, size, sampler or option that does not exist.
    """
    config = dict(loaded.config)
    if sampler is not None:
        config["sampler"] = _own("sampler", sampler, config) if isinstance(sampler, str) else sampler
    if guidance is not None:
        scaled = isinstance(guidance, int | float)
        config["guidance"] = {**_own("guidance", "cfg", config), "scale": guidance} if scaled else guidance
    if precision is not None:
        config["trainer"] = {**config["trainer"], "precision": precision}
    integer("batch", batch, 1)
    build.objective(config)  # refuses a sampler that does not fit
    wanted = (
        loaded.sizes[:1] if size is None else image_sizes("size", list(size) if isinstance(size, Sequence) else size)
    )
    requests = make_requests([labels] if isinstance(labels, int | str) else labels, wanted, n, loaded.class_names)
    device = next(loaded.net.parameters()).device
    sampling = Pipeline.of(config, loaded.objective, loaded.tokenizer, device, batch)
    if isinstance(loaded.tokenizer, Undecodable):
        return torch.stack(sampling.latents(loaded.net, requests, seed))
    return np.stack(sampling.draw(loaded.net, requests, seed))


def _own(group: str, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The run's own option of a group if that is its name, otherwise only the name."""
    return dict(config[group]) if config[group]["name"] == name else {"name": name}


def complete(group: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """A sampler or guidance, what it does not say filled in from conf/<group>/<name>.yaml.

    Raises:
        ValueError: an unknown name, or an option that it does not have.
    """
    name = given.get("name", "null")
    options = compose.read_option(group, name)
    foreign = sorted(given.keys() - options.keys())
    if foreign:
        others = ", ".join(key for key in options if key != "name")
        raise ValueError(f"{group}.{foreign[0]} is not an option of {group}={name}; its options: {others or 'none'}")
    return {**options, **given}


def run_or_chosen(
    group: str, run: Mapping[str, Any], config: Mapping[str, Any], chosen: Sequence[str]
) -> dict[str, Any]:
    """The run's own sampler or guidance, unless an option is chosen; single keys that were set always win.

    Raises:
        ValueError: a key was set that the option does not have.
    """
    values = [override.partition("=")[0] for override in chosen]
    base = dict(config[group] if group in values else run[group])
    for key in (value.removeprefix(f"{group}.") for value in values if value.startswith(f"{group}.")):
        base[key] = config[group][key]
    return complete(group, base)
