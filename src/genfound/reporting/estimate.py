"""What a training would need, without training: parameters, arithmetic, memory, time and energy."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from genfound import build
from genfound.alignment import from_config
from genfound.backbones.base import Backbone, Flops
from genfound.config.options import ema_decays, expert_parallel, expert_shares, sharded, world_size
from genfound.data.packing.budget import batch_size, micro_batches, token_counts
from genfound.layers.moe import Experts
from genfound.loggers.json_lines import lines_of
from genfound.modules.base import train_only

Config = Mapping[str, Any]

MFU = 0.4
"""Share of an accelerator's peak that a well-kept training of transformers reaches."""

CLASSES = 1000
"""Where the data are not there to be counted: ImageNet's."""

SIDES = (8, 16, 32, 64)
"""Tokens a side of the squares whose arithmetic is listed."""

MOST = 16
"""Tokens a side of the images by which activations are measured; they are as many times more as there are tokens."""

FLOAT = 4
"""Bytes of what stays in float32: weights, gradients, the two moments of Adam, averages, the residual stream."""


class Accelerator(NamedTuple):
    """From the maker's data sheet."""

    flops: float  # per second, dense bfloat16
    watts: float


ACCELERATORS = {
    "A100 SXM": Accelerator(312e12, 400),
    "H100 SXM": Accelerator(989e12, 700),
    "H200 SXM": Accelerator(989e12, 700),
}


class Memory(NamedTuple):
    """Bytes on each device."""

    weights: int
    gradients: int
    moments: int
    averages: int
    activations: int  # what the forward pass of a micro-batch keeps for the backward pass
    gathered: int = 0  # whole weights and gradients of what is computed, where each device has but a part of them

    @property
    def total(self) -> int:
        """An upper bound: gradients come as activations go."""
        return sum(self)


@dataclass(frozen=True)
class Estimate:
    """The needs of one training."""

    name: str
    parameters: int
    trained: int
    flops: Flops  # of a forward pass
    unit: int  # pixels per token side
    tokens: float  # of an image, on average
    counted: bool  # from the data; otherwise as the recipe says
    ranks: int
    step_images: float
    budget: int
    memory: Memory
    recomputed: int  # bytes of activations with activation_checkpointing=true
    projectors: int = 0  # parameters beside the network's
    sent: Mapping[int, float] = field(default_factory=dict)  # strategy.expert_parallel -> see `expert_bytes`

    @property
    def training_flops(self) -> float:
        """Of all images, forward and backward, without recomputation and padding."""
        return 3 * self.budget * self.flops.total(1, self.tokens, self.tokens**2)

    def hours(self, accelerator: Accelerator) -> float:
        """Of one accelerator, whatever their number."""
        return self.training_flops / (accelerator.flops * MFU) / 3600

    def gflops(self, height: int, width: int) -> float:
        """Of a forward pass for an image of so many pixels."""
        tokens = height * width / self.unit**2
        return self.flops.total(1, tokens, tokens**2) / 1e9

    def line(self) -> str:
        """The gist."""
        hours = ", ".join(f"{self.hours(accelerator):,.1f} {name} hours" for name, accelerator in ACCELERATORS.items())
        return f"{self.parameters:,} parameters, {self.training_flops:.3g} FLOPs, {hours}"

    def lines(self) -> list[str]:
        """For the user."""
        m, origin = self.memory, "counted in the data" if self.counted else "by the configuration"
        sides = (side * self.unit for side in SIDES)
        sizes = [f"{side}x{side} {self.gflops(side, side):,.1f}" for side in sides]
        parts = "  ".join(f"{key} {_gigabytes(value)}" for key, value in m._asdict().items() if value)
        saved = m.total - m.activations + self.recomputed
        lines = [
            f"{self.name}: {self.parameters:,} parameters, {self.trained:,} of them trained",
            *self._aligned(),
            f"Gflops of a forward pass (a multiply-add is two): {'  '.join(sizes)}",
            f"an image has {self.tokens:,.1f} tokens on average, {origin}",
            f"global step: {self.step_images:,.0f} images, {self.step_images * self.tokens:,.0f} tokens, "
            f"on {self.ranks} devices",
            f"memory of each device, at most: {_gigabytes(m.total)}: {parts}",
            *([f"  with model.activation_checkpointing=true: {_gigabytes(saved)}"] if saved < m.total else []),
            *self._communicated(),
            f"budget: {self.budget:,} images, {self.budget / self.step_images:,.0f} steps, "
            f"{self.training_flops:.3g} FLOPs",
        ]
        for name, accelerator in ACCELERATORS.items():
            hours = self.hours(accelerator)
            energy, days = hours * accelerator.watts / 1000, hours / self.ranks / 24
            shown = f"{hours:,.1f} hours of one, {days:,.2f} days of {self.ranks}, {energy:,.0f} kWh"
            lines.append(f"{name} at {MFU:.0%} of {accelerator.flops / 1e12:,.0f} TFLOP/s: {shown}")
        return lines

    def _aligned(self) -> list[str]:
        if not self.projectors:
            return []
        return [f"  and {self.projectors:,} in projectors of the alignment; the teacher's own work is not counted"]

    def _communicated(self) -> list[str]:
        if not self.sent:
            return []
        ways = ", ".join(f"{_gigabytes(size)} with {share}" for share, size in self.sent.items())
        return [f"for its experts each device sends in a global step, by strategy.expert_parallel: {ways}"]

    def measured(self, folder: Path) -> list[str]:
        """The time by the speed of a run of this configuration that has begun, if there is one."""
        lines = lines_of(folder / "metrics.jsonl")
        rates = [line["perf/images_per_s"] for line in lines if "perf/images_per_s" in line]
        if not rates:
            return ["measured: nothing yet; train with trainer.max_steps=200, and the time by that speed is here"]
        rate = median(rates)
        return [f"measured: {rate:,.1f} images/s in {folder}, {self.budget / rate / 3600:,.2f} hours for the budget"]


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:,.2f} GB"


def estimate(config: Config) -> Estimate:
    """Build the network without values, and measure what two blocks of it keep; see `Estimate`.

    Raises:
        ValueError: an option that does not exist, or a global step that the devices cannot share.
    """
    ranks = world_size(config)
    per_step = micro_batches(config, ranks)
    spec = build.published_spec(config)
    unit = spec.stride * config["model"]["patch_size"]
    tokens, classes, counted = _of_data(config, unit)
    with torch.device("meta"):
        net = build.net(config, spec, classes)
        aligned = from_config.alignment(config, net)
    if config["optimizer"]["trainable"]:
        train_only(net, config["optimizer"]["trainable"])
    projectors = 0 if aligned is None else _count(aligned)
    parameters, trained = _count(net), sum(p.numel() for p in net.parameters() if p.requires_grad)
    dense = config["layout"]["name"] == "dense"
    images = batch_size(config) if dense else config["data"]["max_tokens"] / tokens
    share, experts = expert_parallel(config), _experts(net)
    kept, recomputed = activations(config, images, tokens, experts / len(net.blocks) * (1 - 1 / share))
    divided, gathered, sent = 1, 0, {}
    if sharded(config, ranks):
        divided, gathered = ranks, _gathered(net, ranks, share)
        ways = sorted({1, share if share > 1 else expert_shares(config)[-1]}) if experts else []
        sent = {way: expert_bytes(config, net, ranks, images * tokens, way) for way in ways}
    per = FLOAT * (trained + projectors) // divided
    memory = Memory(
        FLOAT * (parameters + projectors) // divided, per, 2 * per, len(ema_decays(config)) * per, kept, gathered
    )
    budget = config["budget"]["images"] or config["optimizer"]["budget_images"]
    name, step = type(net).__name__, per_step * images
    return Estimate(
        name, parameters, trained, net.flops(), unit, tokens, counted, ranks, step, budget, memory, recomputed,
        projectors, sent,
    )  # fmt: skip


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _experts(module: nn.Module) -> int:
    """Parameters of experts that a router chooses."""
    return sum(_count(layer) for layer in module.modules() if isinstance(layer, Experts))


def _gathered(net: Backbone, ranks: int, share: int) -> int:
    """Bytes of FSDP at most: of two blocks, since the next one is gathered ahead, and of what is outside of blocks.

    Where processes share experts, each gathers its own, or none, if there is one copy.
    """
    blocks = [_count(block) for block in net.blocks]
    outside = _count(net) - sum(blocks)
    whole = 1 / share if share < ranks else 0  # of a block's experts
    largest = max(size - (1 - whole) * _experts(block) for size, block in zip(blocks, net.blocks, strict=True))
    return round(2 * FLOAT * (outside + 2 * largest))


def expert_bytes(config: Config, net: Backbone, ranks: int, tokens: float, share: int) -> float:
    """What each device sends in a global step for its experts, of which `share` processes hold a copy.

    Of n processes, k of them with a copy, a device gathers its E / k experts from n / k in both passes, and has their
    gradients summed there: (1 - k/n) / k of all weights, three times in each micro-batch. Of the rows of its tokens,
    one for each choice, 1 - 1/k go to another device and back, in both passes, and once more in a recomputed block.
    """
    low, model = config["trainer"]["precision"] != "fp32", config["model"]
    reduced = FLOAT // 2 if config["strategy"].get("reduce_dtype") else FLOAT
    weights = (2 * FLOAT + reduced) * _experts(net) * (1 - share / ranks) / share
    every, depth = int(model["activation_checkpointing"]), len(net.blocks)
    passes = 2 * depth + (-(-depth // every) if every else 0)
    rows = passes * 2 * tokens * model["top_k"] * model["width"] * (FLOAT // 2 if low else FLOAT) * (1 - 1 / share)
    return (weights + rows) * micro_batches(config, ranks) / ranks


def _of_data(config: Config, unit: int) -> tuple[float, int, bool]:
    """Mean tokens of an image and the number of classes: from the data where they are, else as the recipe says."""
    root, view = config["data"].get("root"), config["data"]["view"]
    if "root" not in config["data"] or (root not in (None, "???") and Path(root).is_dir()):
        spec = build.published_spec(config)
        images = build.source(config, spec, "train")
        return float(token_counts(images, spec, config["model"]["patch_size"]).mean()), len(images.class_names), True
    if view == "square" or (view is None and config["layout"]["name"] == "dense"):
        return (config["data"]["size"] / unit) ** 2, CLASSES, False
    recipe = config["optimizer"]
    return recipe["tokens_per_step"] / recipe["images_per_step"], CLASSES, False


def activations(config: Config, images: float, tokens: float, elsewhere: float = 0) -> tuple[int, int]:
    """Bytes that the forward pass of so many images keeps: as configured, and with every block recomputed.

    They grow by the same amount with each block and each image, so networks of one and two blocks on one and two
    images tell all; in bf16 unless trainer.precision=fp32, with the rounded weights, of which other processes may keep
    `elsewhere` numbers in each block.
    """
    depth, side = config["model"]["depth"], min(max(isqrt(round(tokens)), 1), MOST)
    low = config["trainer"]["precision"] != "fp32"
    found = {(blocks, rows): _kept(config, blocks, rows, side, low) for blocks in (1, 2) for rows in (1, 2)}
    per_image = {blocks: found[blocks, 2] - found[blocks, 1] for blocks in (1, 2)}
    fixed = {blocks: found[blocks, 1] - per_image[blocks] for blocks in (1, 2)}
    scale = images * tokens / side**2
    block = fixed[2] - fixed[1] + scale * (per_image[2] - per_image[1])
    rest = fixed[1] + scale * per_image[1] - block
    block -= FLOAT // 2 * elsewhere if low else 0
    stream = FLOAT * images * tokens * config["model"]["width"]
    every = int(config["model"].get("activation_checkpointing", False))

    def kept(recomputed: int) -> int:
        return round(rest + (depth - recomputed) * block + recomputed * stream + (block if recomputed else 0))

    return kept(-(-depth // every) if every else 0), kept(depth)


def _kept(config: Config, blocks: int, rows: int, side: int, low: bool) -> int:
    """Bytes that a network of a few blocks keeps of a few square images for the backward pass, without its weights.

    Each weight is one number in memory, seen as a tensor of its shape.
    """
    begin = {"in_context_start"} & config["model"].keys()  # of JiT, whose class tokens are in most blocks
    own = {**config["model"], "depth": blocks, "activation_checkpointing": False, **dict.fromkeys(begin, 0)}
    small = {**config, "model": own}
    spec = build.published_spec(config)
    with torch.device("meta"):
        net = build.net(small, spec, CLASSES)
    net._apply(lambda value: torch.zeros((), dtype=value.dtype).expand(value.shape))  # type: ignore[no-untyped-call]
    net.train()
    latent = torch.zeros(spec.channels, *(side * config["model"]["patch_size"],) * 2)
    batch = build.sampling_layout(config).to_batch([latent] * rows, torch.zeros(rows, dtype=torch.int64))
    if net.text_width is not None:
        batch = batch.with_text([torch.zeros(net.text_tokens, net.text_width)] * rows, net.text_tokens)
    return saved_bytes(net, batch, low)


def saved_bytes(net: Backbone, batch: Any, low: bool) -> int:
    """Bytes that a forward pass keeps for the backward pass, without the weights, each storage once."""
    seen = {p.untyped_storage().data_ptr() for p in net.parameters()}
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            sizes.append(storage.nbytes())
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=low):
        held = net(batch, torch.zeros(len(batch.y)))
    del held
    return sum(sizes)
