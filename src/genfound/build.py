"""From a resolved configuration to objects, with every cross-check in plain words.

Nothing here trains or samples; `fit` and `sampling` use what is built here. Lightning is not imported.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from genfound.backbones.base import Backbone
from genfound.checks import whole
from genfound.data import latents
from genfound.data.base import ImageSource
from genfound.data.loader import MicroBatches, TrainLoader
from genfound.data.order import Order
from genfound.data.packing import Chunker, Grouper, Packer
from genfound.data.pictures import Assembly
from genfound.data.plan import Plan
from genfound.layers.attention import choose_backend
from genfound.layouts import Dense, Layout, Packed, Padded
from genfound.objectives.base import Objective
from genfound.rng import Rng
from genfound.samplers import SAMPLERS
from genfound.tokenizers import Spec, Tokenizer

Config = Mapping[str, Any]

LOADER_KEYS = ("batch_size", "num_workers", "flip")
"""Keys of `data` that belong to loading; all others go to the source."""


@dataclass(frozen=True)
class Parts:
    """Everything a training run is made of, checked to fit together."""

    config: Config
    ranks: int
    device: torch.device
    tokenizer: Tokenizer
    images: ImageSource
    held_out: ImageSource
    net: Backbone
    objective: Objective
    layout: Layout
    plan: Plan

    @property
    def micro_batches(self) -> int:
        """Micro-batches that each rank accumulates in a global step."""
        return self.plan.per_step // self.ranks

    @property
    def workers(self) -> int:
        """Processes that read for a rank."""
        return min(self.config["data"]["num_workers"], os.cpu_count() or 1)

    @property
    def held_out_plan(self) -> Plan:
        """Steps over the held-out images, in a fixed order that does not depend on the ranks."""
        rows = self.layout.max_images if isinstance(self.layout, Packed) else None
        return plan(self.config, self.held_out, self.tokenizer.spec, self.objective.weight, 1, 0, rows)

    @property
    def assembly(self) -> Assembly:
        """From decoded images to batches."""
        return Assembly(self.tokenizer, self.layout, Rng(self.config["seed"], "encode"))

    def batches(self, images: ImageSource, flips: Rng | None = None) -> MicroBatches:
        """Reads micro-batches; where the tokenizer is a network, they are encoded on the training device."""
        return MicroBatches(images, None if self.tokenizer.online else self.assembly, flips)

    def loader(self, rank: int) -> TrainLoader:
        """The training batches of a rank."""
        flips = Rng(self.config["seed"], "train") if self.config["data"]["flip"] else None
        batches = self.batches(self.images, flips)
        return TrainLoader(batches, self.plan, rank, self.ranks, self.workers, self.device.type == "cuda")

    def report(self) -> list[str]:
        """What is about to be trained, in lines for the user."""
        parameters = sum(p.numel() for p in self.net.parameters())
        running = precision(self.config["trainer"]["precision"], self.device)
        micro = {"packed": "packs of {max_tokens:,} tokens", "dense": "batches of {batch_size:,} images"}
        unit = micro.get(self.layout.name, "padded batches").format(**self.config["data"])
        if "attention" in self.config["model"]:
            dtype = torch.bfloat16 if running == "bf16-mixed" else torch.float32
            running += f", attention {choose_backend(self.config['model']['attention'], self.device.type, dtype)}"
        return [
            *self.images.report(),
            f"{type(self.net).__name__}: {parameters:,} parameters, on {self.device.type} in {running}",
            f"global step: {self.plan.per_step} {unit}, {self.micro_batches} on each of {self.ranks} rank(s)",
        ]


def parts(config: Config, ranks: int) -> Parts:
    """Build a training run.

    Raises:
        ValueError: something does not fit together.
    """
    codec = training_tokenizer(config)
    images, held_out = (source(config, codec.spec, split) for split in ("train", "val"))
    backbone = net(config, codec.spec, len(images.class_names))
    goal = objective(config)
    return Parts(
        config=config,
        ranks=ranks,
        device=device(config["trainer"]["accelerator"]),
        tokenizer=codec,
        images=images,
        held_out=held_out,
        net=backbone,
        objective=goal,
        layout=layout(config, backbone, [images, held_out], codec.spec),
        plan=plan(config, images, codec.spec, goal.weight, ranks, config["seed"]),
    )


def tokenizer(config: Config) -> Tokenizer:
    """The tokenizer of a configuration."""
    built: Tokenizer = construct("tokenizer", config["tokenizer"])
    return built


def training_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer of a training run; its weights are not loaded where latents are read."""
    if config["data"].get("source", "images") == "images":
        return tokenizer(config)
    load = functools.partial(tokenizer, {"tokenizer": config["tokenizer"]})
    return latents.stored_tokenizer(config["data"], config["tokenizer"], load)


def source(config: Config, spec: Spec, split: str) -> ImageSource:
    """The images or latents of a configuration; `split` is `train` or `val`."""
    options = {key: value for key, value in config["data"].items() if key not in LOADER_KEYS}
    options["view"] = options["view"] or ("square" if config["layout"]["name"] == "dense" else "native")
    patch, kind = config["model"]["patch_size"], options.pop("source", "images")
    built: ImageSource
    if kind == "images":
        built = construct("data", options, unit=spec.stride * patch, split=split, seed=config["seed"])
    else:
        built = latents.source(kind, options, spec, patch, split, config["data"]["flip"] and split == "train")
    if split == "train" and not len(built.labels):
        raise ValueError("data: there is no image to train on")
    return built


def net(config: Config, spec: Spec, num_classes: int) -> Backbone:
    """The backbone for a tokenizer and a number of classes, initialised from the seed.

    Raises:
        ValueError: channels of model and tokenizer differ, or the layout is not one of the backbone's.
    """
    options = dict(config["model"])
    channels = options.pop("channels")
    if channels not in (None, spec.channels):
        name = _name(config["tokenizer"])
        raise ValueError(
            f"tokenizer is {name} ({spec.channels} channels) but model.channels is {channels}; "
            "leave model.channels=null or choose the other tokenizer"
        )
    if options.get("learn_sigma") == "auto":
        with torch.device("cpu"):  # also where the network itself is built without memory, on meta
            options["learn_sigma"] = objective(config).learned_variance
    torch.manual_seed(Rng(config["seed"]).integer("initialise"))
    built: Backbone = construct("model", options, channels=spec.channels, num_classes=num_classes)
    if config["layout"]["name"] not in built.layouts:
        raise ValueError(
            f"layout={config['layout']['name']} does not fit {type(built).__name__}; "
            f"choose layout={' or '.join(built.layouts)}"
        )
    return built


def objective(config: Config) -> Objective:
    """The objective of a configuration, checked against its sampler.

    Raises:
        ValueError: the pair of objective and sampler is not legal.
    """
    built: Objective = construct("objective", config["objective"])
    sampler = config["sampler"]["name"]
    if sampler not in built.samplers or sampler not in SAMPLERS:
        raise ValueError(
            f"sampler={sampler} cannot sample objective={built.name}; choose sampler={' or '.join(built.samplers)}"
        )
    return built


def layout(config: Config, backbone: Backbone, splits: Sequence[ImageSource], spec: Spec) -> Layout:
    """The layout of training and held-out images, of static shape.

    Raises:
        ValueError: the images do not have one size, which a dense layout needs.
    """
    name, patch = config["layout"]["name"], config["model"]["patch_size"]
    if name == "dense":
        if len(np.unique(np.concatenate([images.sizes for images in splits]), axis=0)) > 1:
            raise ValueError("layout=dense needs images of one size; set data.view=square, or layout=packed")
        return Dense(patch)
    if name == "padded":
        return Padded(patch, max(int(token_counts(images, spec, patch).max(initial=0)) for images in splits))
    tokens = config["data"]["max_tokens"]
    limit = max_images(token_counts(splits[0], spec, patch), tokens)
    return Packed(patch, tokens, limit, filler_label=backbone.null_label or 0)


def sampling_layout(config: Config) -> Layout:
    """The layout of a sampling batch, whose images have one size."""
    name, patch = config["layout"]["name"], config["model"]["patch_size"]
    return {"dense": Dense, "padded": Padded, "packed": Packed}[name](patch)


def plan(
    config: Config, images: ImageSource, spec: Spec, weight: str, ranks: int, seed: int, rows: int | None = None
) -> Plan:
    """The global steps over a source; a pack has at most `rows` images, or twice what it holds on average.

    Raises:
        ValueError: the global step does not divide into micro-batches of the ranks.
    """
    tokens = token_counts(images, spec, config["model"]["patch_size"])
    order = Order(len(tokens), seed)
    budget = config["data"]["max_tokens"]
    grouper: Grouper
    if config["layout"]["name"] == "dense":
        micro = config["data"]["batch_size"]
        whole("data.batch_size", micro, 1)
        per_step, rest = divmod(config["batch"]["images"] or config["optimizer"]["images_per_step"], micro)
        if rest or not per_step:
            raise ValueError(f"batch.images must be a multiple of data.batch_size={micro}")
        grouper = Chunker(micro)
    else:
        per_step = config["batch"]["packs"] or max(round(config["optimizer"]["tokens_per_step"] / budget), 1)
        if int(tokens.max()) > budget:
            raise ValueError(
                f"an image has {int(tokens.max())} tokens, more than data.max_tokens={budget}; raise data.max_tokens"
            )
        grouper = Packer(lambda k: int(tokens[order[k]]), budget, rows or max_images(tokens, budget))
    if per_step % ranks:
        raise ValueError(
            f"a global step of {per_step} micro-batches cannot be shared by trainer.devices={ranks}; "
            f"set batch.packs (or batch.images) to a multiple"
        )
    return Plan(order, tokens, grouper, per_step, weight, seed)


def max_images(tokens: np.ndarray, budget: int) -> int:
    """Rows of a static pack: twice what a pack holds on average."""
    return math.ceil(2 * budget / float(tokens.mean()))


def token_counts(images: ImageSource, spec: Spec, patch_size: int) -> np.ndarray:
    """(n,) tokens of each image."""
    counts: np.ndarray = (images.sizes // (spec.stride * patch_size)).prod(axis=1)
    return counts


def precision(wanted: str, device: torch.device) -> str:
    """`auto`, `bf16` or `fp32` -> Lightning's name; auto is bf16 where the machine has bf16 arithmetic.

    Raises:
        ValueError: unknown setting.
    """
    if wanted == "auto":
        wanted = "bf16" if _has_bf16(device) else "fp32"
    names = {"bf16": "bf16-mixed", "fp32": "32-true"}
    if wanted not in names:
        raise ValueError(f"precision={wanted} is unknown; choose auto, bf16 or fp32")
    return names[wanted]


def _has_bf16(device: torch.device) -> bool:
    """Whether the machine's own arithmetic has bf16; PyTorch also emulates it, slowly."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def device(wanted: str) -> torch.device:
    """`auto`, `cpu` or `cuda` -> the device of this process.

    Raises:
        ValueError: the accelerator is unknown or absent.
    """
    if wanted not in ("auto", "cpu", "cuda"):
        raise ValueError(f"accelerator={wanted} is unknown; choose auto, cpu or cuda")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("accelerator=cuda, but this machine has no CUDA device")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def device_of(wanted: str, local_rank: int) -> torch.device:
    """The device of one process of a group on this machine, which becomes the one that `cuda` means there.

    Raises:
        ValueError: the accelerator is unknown or absent.
    """
    found = device(wanted)
    if found.type == "cuda":
        found = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(found)
    return found


def published_spec(config: Config) -> Spec:
    """The shape of the latents of a configuration's tokenizer, as published; its weights are not needed."""
    module, _, name = str(config["tokenizer"]["_target_"]).rpartition(".")
    spec: Spec = getattr(importlib.import_module(module), name).published
    return spec


def construct(group: str, options: Mapping[str, Any], **extra: Any) -> Any:
    """Call the class or function that `options["_target_"]` names, with the other options.

    Raises:
        ValueError: the target does not exist, or does not take these options.
    """
    arguments = dict(options)
    module, _, name = str(arguments.pop("_target_")).rpartition(".")
    try:
        target = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{group}._target_={module}.{name} cannot be imported: {error}") from None
    try:
        return target(**arguments, **extra)
    except TypeError as error:
        if f"{name}.__init__" in str(error) or f"{name}()" in str(error):
            raise ValueError(f"{group}: {error}") from None
        raise


def _name(options: Mapping[str, Any]) -> str:
    return str(options["_target_"]).rpartition(".")[2].lower()
