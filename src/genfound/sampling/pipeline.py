"""Sampling: from labels and sizes to images.

Image k of a request depends on (seed, k, its label, its size) and on nothing else: its noise is its own, and
the network always sees a full micro-batch of images of one size, padded with copies where needed, because
matrix kernels differ in the last bit with the number of rows. Two exceptions agree to rounding only: how many rows an
expert of DiT-MoE sees, and which form DiG's recurrence takes where gates are strong, depend on the other images too.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from genfound import build
from genfound.backbones.base import Backbone
from genfound.batch import Batch
from genfound.checkpoints.load import LoadedModel, load
from genfound.config import compose, targets
from genfound.config.checks import image_sizes, integer
from genfound.config.targets import trusted
from genfound.data.images.pixels import to_uint8
from genfound.layers.float64 import float64_device
from genfound.layouts import Layout
from genfound.objectives.base import GuidanceOf, Objective
from genfound.rng import Rng
from genfound.runtime import devices
from genfound.runtime.progress import Progress, no_progress
from genfound.samplers import Sampler
from genfound.sampling.requests import SampleRequest, batches, check_size, requests_of
from genfound.text import TextEncoder
from genfound.text.from_config import text_encoder
from genfound.tokenizers import Tokenizer, Undecodable

Drawn = TypeVar("Drawn")


@dataclass(frozen=True)
class Pipeline:
    """How to sample from a network."""

    objective: Objective  # what the network was trained for
    tokenizer: Tokenizer
    layout: Layout  # without a budget of tokens
    sampler: Sampler  # with its steps and options
    guidance: GuidanceOf | None  # for `Objective.field`
    micro_batch: int  # images per network call
    precision: str  # `bf16-mixed` or `32-true`
    uint8: str  # how decoded values become bytes, `round` or `truncate`
    device: torch.device  # where the network is
    guide: Backbone | None = None  # the other network of autoguidance
    text: TextEncoder | None = None  # of a model of text

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], objective: Objective, tokenizer: Tokenizer, device: torch.device,
        micro_batch: int,
    ) -> Self:  # fmt: skip
        """Layout, sampler, guidance and precision of a configuration."""
        guiding = compose.fill_option("guidance", config["guidance"])
        weights = guiding.get("weights")
        guide = None if weights is None else load_guide(weights, objective, trusted(config)).to(device)
        kind = targets.target("guidance", guiding, trusted(config)) if compose.TARGET in guiding else None
        if needed := getattr(kind, "layout", None):
            config = {**config, "layout": compose.read_option("layout", needed)}
        return cls(
            objective=objective,
            tokenizer=tokenizer,
            layout=build.sampling_layout(config),
            sampler=build.sampler(config),
            guidance=build.guidance(config, **({} if guide is None else {"guide": objective.adapt(guide)})),
            micro_batch=micro_batch,
            precision=devices.precision(config["trainer"]["precision"], device, "precision"),
            uint8=config["sample"]["uint8"],
            device=device,
            guide=guide,
            text=text_encoder(config),
        )

    def check(self, net: Backbone, sizes: Collection[tuple[int, int]] = ()) -> None:
        """Raise a ValueError if this network cannot be sampled from so, or not at these sizes; costs nothing."""
        self.sampler.times(self.objective)
        factor = getattr(self.field(net).net, "factor", 1)
        for size in sizes:
            check_size(size, self.tokenizer.spec.stride * self.layout.patch_size, factor)

    def field(self, net: Backbone) -> Any:
        """What the sampler sees of a network."""
        field: Any = self.objective.field(net, self.guidance)
        if not self.sampler.options.get("quantize_x0"):
            return field
        if not hasattr(self.tokenizer, "quantise"):
            raise ValueError("sampler.quantize_x0=true needs a tokenizer with a codebook, such as tokenizer=vq_f4")
        return replace(field, quantise=self._quantised)

    def _quantised(self, x: Tensor, batch: Batch) -> Tensor:
        """The nearest codes of latents, shaped like `batch.x`."""
        latents = torch.stack(self.layout.to_latents(x, batch)).to(self.device)
        codes = self.tokenizer.quantise(latents).to(x.device)  # type: ignore[attr-defined]
        return self.layout.to_batch(list(codes), batch.y).x

    @property
    def rows(self) -> int:
        """Images of a network call: one where the steps of an adaptive sampler would couple them."""
        return 1 if self.sampler.coupling == "image" else self.micro_batch

    def __call__(
        self, net: Backbone, requests: Sequence[SampleRequest], seed: int, progress: Progress = no_progress
    ) -> list[np.ndarray]:
        """Images (height, width, 3) uint8 in the order of the requests; see `latents`.

        `progress` is called after each step too, with a share of the images that are under way.
        """
        return self._each(net, requests, seed, self._decode, progress)

    def latents(self, net: Backbone, requests: Sequence[SampleRequest], seed: int) -> list[Tensor]:
        """Latents (C, h, w) in the order of the requests; the network is in eval mode, the seed is of all noise."""
        return self._each(net, requests, seed, lambda z: z, no_progress)

    def _each(
        self, net: Backbone, requests: Sequence[SampleRequest], seed: int, finish: Callable[[Tensor], Drawn],
        progress: Progress,
    ) -> list[Drawn]:  # fmt: skip
        self.check(net, {request.size for request in requests})
        progress(0, len(requests))
        images: dict[int, Drawn] = {}
        for places in batches(requests, self.rows):

            def under_way(share: float, before: int = len(images), count: int = len(places)) -> None:
                progress(before + count * share, len(requests))

            with devices.float32_products(self.precision, self.device):  # also where training has set it otherwise
                latents = self._latents(net, [requests[place] for place in places], seed, under_way)
                images |= {place: finish(z) for place, z in zip(places, latents, strict=True)}
            progress(len(images), len(requests))
        return [images[place] for place in range(len(requests))]

    @torch.no_grad()
    def _decode(self, latent: Tensor) -> np.ndarray:
        return to_uint8(self.tokenizer.decode(latent[None])[0], self.uint8)

    @torch.no_grad()
    def _latents(
        self, net: Backbone, requests: list[SampleRequest], seed: int, under_way: Callable[[float], None]
    ) -> list[Tensor]:
        """Latents (C, h, w) of up to `micro_batch` images of one size; all but the network is where float64 can be."""
        padded = requests + [requests[-1]] * (self.rows - len(requests))
        field, times = self.field(net), self.sampler.times(self.objective)
        copies = field.net.copies
        noise = self._noise(padded, seed)
        labels = torch.tensor([r.label if r.prompt is None else 0 for r in padded])
        if copies == 2:
            labels = torch.cat([labels, torch.full_like(labels, net.null_label or 0)])
        batch = self.layout.to_batch(noise * copies, labels).to(float64_device(self.device))
        if self.text is not None:
            batch = batch.with_text([text.to(batch.x.device) for text in self._texts(padded)] * copies, net.text_tokens)
        rng = PerImageNoise(seed, padded * copies, self.layout, noise[0].shape)

        def stepped(step: int, _: Batch) -> None:
            under_way((step + 1) / (len(times) + 1))

        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16-mixed"):
            batch = self.sampler(field, batch, times, rng, stepped if self.sampler.coupling == "" else None)
        batch = batch.to(self.device)
        real = torch.arange(len(labels), device=self.device) < len(requests)
        if not batch.x.isfinite().all():
            way = "try guidance=none, more sampler.steps or precision=fp32"
            raise FloatingPointError(f"an image is not finite: the network or its steps diverge; {way}")
        return self.layout.to_latents(batch.x, replace(batch, real=real))

    def _texts(self, requests: Sequence[SampleRequest]) -> list[Tensor]:
        """What the text encoder makes of each prompt, (n, E); each alone, since kernels differ with their rows."""
        assert self.text is not None
        prompts = [str(request.prompt) for request in requests]
        made = {prompt: self.text([prompt], self.device)[0] for prompt in dict.fromkeys(prompts)}
        return [made[prompt] for prompt in prompts]

    def _noise(self, requests: Sequence[SampleRequest], seed: int) -> list[Tensor]:
        """The latent (C, h, w) that each image begins with."""
        channels, stride = self.tokenizer.spec
        shapes = [(channels, r.size[0] // stride, r.size[1] // stride) for r in requests]
        numbered = zip(requests, shapes, strict=True)
        streams = ((Rng(seed, "sample", request.number), shape) for request, shape in numbered)
        return [self.objective.noise_scale * stream.normal("noise", shape) for stream, shape in streams]


class PerImageNoise:
    """Step noise of a micro-batch: each image draws its own, as a latent, whatever the layout."""

    def __init__(self, seed: int, requests: Sequence[SampleRequest], layout: Layout, shape: Sequence[int]) -> None:
        self.streams = [Rng(seed, "sample", request.number) for request in requests]
        self.layout, self.shape = layout, shape

    def normal(self, step: int) -> Tensor:
        """Standard normal numbers of a step, shaped like the batch, on the host."""
        drawn = [stream.at(step).normal("step_noise", self.shape) for stream in self.streams]
        return self.layout.to_batch(drawn, torch.zeros(len(drawn), dtype=torch.long)).x


def load_guide(weights: str, objective: Objective, trust: Sequence[str]) -> Backbone:
    """The other network of autoguidance."""
    try:
        other = load(weights, trust=trust)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"guidance.weights={weights}: {error}") from None
    for key, value in objective.signature.items():
        found = other.objective.signature.get(key, f"that of {other.objective.name}")
        if found != value:
            raise ValueError(f"guidance.weights={weights} has another {key}: {found} there, {value} here")
    return other.net


def sample(
    loaded: LoadedModel,
    labels: int | str | Sequence[int | str] | None = None,
    size: tuple[int, int] | None = None,
    n: int = 1,
    sampler: str | Mapping[str, Any] | None = None,
    guidance: float | Mapping[str, Any] | None = None,
    seed: int = 0,
    batch: int = 16,
    precision: str | None = None,
    prompts: str | Sequence[str] | None = None,
) -> np.ndarray | Tensor:
    """Images of the given labels or, of a model of text, prompts; their latents where the tokenizer is absent.

    Args:
        loaded: what `genfound.load` returned.
        labels: class numbers or names, `None` for ten classes; a number that is the name of a class is this class.
        prompts, n: what is to be drawn by a model of text; images of each prompt, or of each label.
        size: (height, width) in pixels; `None` is the most typical size of the training data.
        sampler, guidance: a name or a scale, or all options; `None` is the run's own.
        seed, batch: of all noise; images per network call.
        precision: `auto`, `bf16` or `fp32`; `None` is the run's own.

    Returns:
        (images, height, width, 3) uint8, or latents (images, C, h, w).

    Raises:
        ValueError: a label, size, sampler or option that does not exist, or prompts for classes.
    """
    integer("batch", batch, 1)
    config = _chosen(loaded.config, sampler, guidance, precision)
    wanted = (
        loaded.sizes[:1] if size is None else image_sizes("size", list(size) if isinstance(size, Sequence) else size)
    )
    requests, _ = requests_of(loaded, labels, prompts, wanted, n)
    device = next(loaded.net.parameters()).device
    pipeline = Pipeline.from_config(config, build.objective(config), loaded.tokenizer, device, batch)
    if isinstance(loaded.tokenizer, Undecodable):
        return torch.stack(pipeline.latents(loaded.net, requests, seed))
    return np.stack(pipeline(loaded.net, requests, seed))


def _chosen(
    run: Mapping[str, Any],
    sampler: str | Mapping[str, Any] | None,
    guidance: float | Mapping[str, Any] | None,
    precision: str | None,
) -> dict[str, Any]:
    """The run's configuration with what was chosen; a name alone, or a scale, leaves the run's other options."""
    if isinstance(sampler, str):
        sampler = run["sampler"] if run["sampler"].get("name") == sampler else {"name": sampler}
    if isinstance(guidance, int | float):
        guidance = {**(run["guidance"] if run["guidance"].get("name") == "cfg" else {"name": "cfg"}), "scale": guidance}
    trainer = None if precision is None else {**run["trainer"], "precision": precision}
    chosen = {"sampler": sampler, "guidance": guidance, "trainer": trainer}
    return {**run, **{group: options for group, options in chosen.items() if options is not None}}


def as_composed(run: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's configuration with the sampler, guidance, byte rule and precision of a composed conf/sample.yaml."""
    groups = {"sampler": config["sampler"], "guidance": config["guidance"], "trust": trusted(run)}
    return {
        **run,
        **compose.with_own_targets(groups),
        "sample": {**run["sample"], "uint8": config["uint8"] or run["sample"]["uint8"]},
        "trainer": {**run["trainer"], "precision": config["precision"] or run["trainer"]["precision"]},
    }
