"""From a resolved configuration to objects, with every cross-check in plain words; Lightning is not imported."""

import functools
import inspect
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from genfound.alignment import Alignment, TeacherFeatures, from_config, stored
from genfound.backbones.base import Backbone
from genfound.config import compose, targets
from genfound.config.compose import TARGET
from genfound.config.options import text_sizes
from genfound.config.targets import instantiate, partial, trusted
from genfound.data.images.base import ImageSource, LatentSource
from genfound.data.images.views import VIEW_KEYS, ImageViews
from genfound.data.latents import stored_tokenizer
from genfound.data.latents.store import Store
from genfound.data.packing.batch_plan import MicroBatch, Plan
from genfound.data.packing.budget import (
    batch_size,
    held_out_batches,
    max_images,
    micro_batches,
    token_budget,
    token_counts,
)
from genfound.data.packing.collate import Collate
from genfound.data.packing.loader import MicroBatches, TrainLoader
from genfound.data.packing.order import Order
from genfound.data.packing.packer import Batcher, FixedBatcher, Packer, Repeated
from genfound.layers.attention import choose_backend
from genfound.layers.gla import GatedLinearAttention
from genfound.layers.ssm import Mamba
from genfound.layouts import Layout
from genfound.objectives.base import GuidanceOf, Objective
from genfound.rng import Rng
from genfound.runtime.devices import check_count, device, precision
from genfound.samplers import Sampler
from genfound.text import TextEncoder
from genfound.text.from_config import check_captions, reader_of_text, text_encoder
from genfound.tokenizers import LatentSpec, Tokenizer, Undecodable
from genfound.tokenizers.autoencoder import Autoencoder
from genfound.tokenizers.weights import locate, option_of

Config = Mapping[str, Any]

LOADER_KEYS = ("batch_size", "num_workers", "flip")
"""Keys of `data` that belong to loading; all others go to the source."""


@dataclass(frozen=True)
class RunComponents:
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
    alignment: Alignment | None = None  # to the features of these teachers
    teachers: TeacherFeatures | None = None

    @property
    def micro_batches(self) -> int:
        """Micro-batches that each rank accumulates in a global step."""
        return self.plan.per_step // self.ranks

    @property
    def workers(self) -> int:
        """Processes that read for a rank."""
        return min(self.config["data"]["num_workers"], os.cpu_count() or 1)

    def validation(self, images: int) -> list[MicroBatch]:
        """Micro-batches of the first held-out images, see `held_out_batches`."""
        tokens = token_counts(self.held_out, self.tokenizer.spec, self.layout.patch_size)
        return held_out_batches(self.config, tokens, self.layout, images, self.objective.weight)

    @property
    def assembly(self) -> Collate:
        """From decoded images to batches."""
        return Collate(self.tokenizer, self.layout, Rng(self.config["seed"], "encode"))

    @property
    def text_encoder(self) -> TextEncoder:
        """Of a model of text; it is loaded when it is first asked for."""
        return cast(TextEncoder, text_encoder(self.config))

    def batches(self, images: ImageSource, assembly: Collate, flips: Rng | None = None) -> MicroBatches:
        """Reads micro-batches; where images or captions are for a network, they are encoded on the training device."""
        text = None if self.net.text_width is None else reader_of_text(images)
        return MicroBatches(images, None if self.tokenizer.online or text else assembly, flips, text=text)

    @property
    def unit(self) -> int:
        """Pixels per token side."""
        return self.tokenizer.spec.stride * self.layout.patch_size

    def loader(self, rank: int) -> TrainLoader:
        """The training batches of a rank."""
        flips = Rng(self.config["seed"], "train") if self.config["data"]["flip"] else None
        batches = self.batches(self.images, self.assembly, flips)
        if self.teachers is not None and self.teachers.stored:
            read = stored.FeatureReader(cast(Store, self.images), self.teachers)
            batches = replace(batches, assembly=None, features=read)
        elif self.teachers is not None:  # they see the images on the training device
            anew = self.teachers.pixels or reads_latents(self.config)
            reread = (self.unit, self.teachers.pixels or self.unit) if anew else None
            batches = replace(batches, assembly=None, reread=reread)
        return TrainLoader(batches, self.plan, rank, self.ranks, self.workers, self.device.type == "cuda")

    def report(self) -> list[str]:
        """What is about to be trained, in lines for the user."""
        parameters = sum(p.numel() for p in self.net.parameters())
        running = precision(self.config["trainer"]["precision"], self.device)
        micro = {
            "packed": f"packs of {self.config['data']['max_tokens']:,} tokens",
            "dense": f"batches of {batch_size(self.config):,} images",
        }
        unit = micro.get(self.layout.name, "padded batches")
        if "attention" in self.config["model"]:
            dtype = torch.bfloat16 if running == "bf16-mixed" else torch.float32
            running += f", attention {choose_backend(self.config['model']['attention'], self.device.type, dtype)}"
        running += "".join(f", recurrence {form}" for form in recurrences(self.net, self.device))
        return [
            *self.images.report(),
            f"{type(self.net).__name__}: {parameters:,} parameters, on {self.device.type} in {running}",
            *self._aligned(),
            f"global step: {self.plan.per_step} {unit}, {self.micro_batches} on each of {self.ranks} rank(s)",
        ]

    def _aligned(self) -> list[str]:
        if self.alignment is None or self.teachers is None:
            return []
        parameters = sum(p.numel() for p in self.alignment.parameters())
        names = ", ".join(self.teachers.teachers) + (", as the store has it" if self.teachers.stored else "")
        return [f"block {self.alignment.depth} aligned to {names}: {parameters:,} more parameters in projectors"]


def check(config: Config, ranks: int) -> None:
    """Look for what is wrong with a training run and can be known at once, without reading weights or images."""
    place = device(config["trainer"]["accelerator"], key="trainer.accelerator")
    check_count("trainer.devices", config["trainer"]["devices"], place)
    if place.type == "mps" and ranks > 1:
        way = "set trainer.num_nodes=1, or trainer.accelerator=cpu"
        raise ValueError(f"trainer.num_nodes={config['trainer']['num_nodes']}: an Apple GPU trains alone; {way}")
    precision(config["trainer"]["precision"], place)
    micro_batches(config, ranks)
    root = config["data"].get("root")
    if root is not None and not Path(root).is_dir():
        raise FileNotFoundError(f"data.root={root} is not a folder")
    with torch.device("meta"):
        backbone = net(config, _expected_spec(config), num_classes=1)
        recurrences(backbone, place)
        from_config.alignment(config, backbone)
        from_config.teachers(config)
    goal, preview = objective(config), config["callbacks"].get("preview") or {}
    if preview.get("every") and config["guidance"].get("weights") is None:  # a guiding network would have to be read
        sampler(config).times(goal)
        goal.field(backbone, guidance(config))


def recurrences(backbone: Backbone, place: torch.device) -> list[str]:
    """The forms in which the recurrent layers of a network will run on a device; a ValueError where one cannot."""
    recurrent = (layer for layer in backbone.modules() if isinstance(layer, (GatedLinearAttention, Mamba)))
    return sorted({layer.form_on(place.type) for layer in recurrent})


def _expected_spec(config: Config) -> LatentSpec:
    """The published one of the tokenizer; what the model expects, where other weights or latents may have another."""
    weights = Path(config["tokenizer"].get("weights") or "").expanduser()
    if not reads_latents(config) and (weights == Path() or not weights.exists()):
        return published_spec(config)
    return LatentSpec(config["model"]["channels"] or 4, 1)


def build_run(config: Config, ranks: int, with_values: bool = True) -> RunComponents:
    """Build a training run; its network without values, on `meta`, where only the data are wanted."""
    check(config, ranks)
    codec = training_tokenizer(config)
    images, held_out = (source(config, codec.spec, split) for split in ("train", "val"))
    check_captions(config, images)
    with nullcontext() if with_values else torch.device("meta"):
        backbone = net(config, codec.spec, len(images.class_names))
    goal, place = objective(config), device(config["trainer"]["accelerator"])
    arranged = layout(config, backbone, [images, held_out], codec.spec)
    steps = plan(config, images, codec.spec, goal.weight, ranks, config["seed"])
    aligned, taught = from_config.alignment(config, backbone), from_config.teachers(config, images)
    seen = getattr(images, "image_root", None) is not None or not reads_latents(config)
    if taught is not None and not (taught.stored or seen):
        raise ValueError(
            "alignment: teachers see images, and data are latents; choose data=imagenet_native or another one of "
            "images, data=nit_latents with data.image_root=..., a store of genfound.encode with alignment=..., or "
            "alignment=none, which is another system"
        )
    if taught is not None:
        taught.check_source(images)
    return RunComponents(
        config, ranks, place, codec, images, held_out, backbone, goal, arranged, steps, aligned, taught
    )


def tokenizer(config: Config) -> Tokenizer:
    """The tokenizer of a configuration."""
    if "???" in config["tokenizer"].values():
        raise FileNotFoundError(f"{name_of(config['tokenizer'])} needs a folder; give tokenizer.weights=FOLDER")
    return instantiate("tokenizer", config["tokenizer"], trusted(config))


def fetch_tokenizer(config: Config, download: bool = True) -> Path | None:
    """The folder with the weights of a tokenizer, downloaded if they are not at hand; `None` if it needs none.

    Commands call this before they start processes, which never download.
    """
    kind = targets.target("tokenizer", config["tokenizer"], trusted(config))
    weights = config["tokenizer"].get("weights")
    of_hub = isinstance(kind, type) and issubclass(kind, Autoencoder) and weights not in stored_tokenizer.RANDOM
    return locate(str(weights), download) if of_hub else None


def hinted_tokenizer(options: Mapping[str, Any], codec: str) -> dict[str, Any]:
    """The options of a tokenizer that is named: an option of the group, or weights, whose folder tells their class."""
    if codec in compose.option_names("tokenizer"):
        chosen = compose.read_option("tokenizer", codec)
        if "???" in chosen.values():
            raise ValueError(f"hints.tokenizer={codec} needs weights; give the folder that holds them instead")
        return chosen
    option = option_of(Path(codec))
    of_folder = {} if option is None else compose.read_option("tokenizer", option)
    same = of_folder.get("_target_") in (None, options["_target_"])
    return {**(options if same else of_folder), "weights": codec}


def tokenizer_if_there(config: Config, path: Path) -> Tokenizer:
    """The tokenizer of a model, or its shape alone; published weights that cannot fit are not reached for."""
    channels, spec = config["model"]["channels"], None
    every = [compose.read_option("tokenizer", name) for name in compose.option_names("tokenizer")]
    if any(all(config["tokenizer"].get(k) == option.get(k) for k in ("_target_", "weights")) for option in every):
        spec = published_spec(config)
    if spec is None or channels in (None, spec.channels):
        try:
            codec = tokenizer(config)
        except FileNotFoundError as error:
            return Undecodable(published_spec(config), str(error))
        if channels in (None, codec.spec.channels):
            return codec
        spec = codec.spec
    return Undecodable(
        spec._replace(channels=channels),
        f"{path} is a model of {channels} channels, and {name_of(config['tokenizer'])} has {spec.channels}; "
        "say hints.tokenizer=..., an option such as pixel or a folder with the weights of its autoencoder",
    )


def training_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer of a training run; its weights are not loaded where latents are read."""
    if not reads_latents(config):
        return tokenizer(config)
    trust = trusted(config)
    load = functools.partial(tokenizer, {"tokenizer": config["tokenizer"], "trust": trust})
    return stored_tokenizer.stored_tokenizer(config["data"], config["tokenizer"], load, trust)


def reads_latents(config: Config) -> bool:
    """Whether the data are latents that were encoded before."""
    kind = targets.target("data", config["data"], trusted(config))
    return LatentSource in getattr(kind, "__mro__", ())


def source(config: Config, spec: LatentSpec, split: str) -> ImageSource:
    """The images or latents of a configuration; `split` is `train` or `val`."""
    options = {key: value for key, value in config["data"].items() if key not in LOADER_KEYS}
    options["view"] = options["view"] or ("square" if config["layout"]["name"] == "dense" else "native")
    mirrored, unit = config["data"]["flip"] and split == "train", spec.stride * config["model"]["patch_size"]
    given: dict[str, Any] = {"unit": unit, "spec": spec, "seed": config["seed"], "mirrored": mirrored}
    named = inspect.signature(targets.target("data", options, trusted(config))).parameters
    if "views" in named:
        given["views"] = ImageViews.of(options, unit)
        options = {key: value for key, value in options.items() if key not in VIEW_KEYS}
    extra = {key: value for key, value in given.items() if key in named}
    built: ImageSource = instantiate("data", options, trusted(config), split=split, **extra)
    if split == "train" and not len(built.labels):
        raise ValueError("data: there is no image to train on")
    return built


def net(config: Config, spec: LatentSpec, num_classes: int) -> Backbone:
    """The backbone for a tokenizer and a number of classes, initialised from the seed; on `meta` without values."""
    options = dict(config["model"])
    channels = options.pop("channels")
    if channels not in (None, spec.channels):
        name = name_of(config["tokenizer"])
        raise ValueError(
            f"tokenizer is {name} ({spec.channels} channels) but model.channels is {channels}; "
            "leave model.channels=null or choose the other tokenizer"
        )
    if options.get("learn_sigma") == "auto":
        with torch.device("cpu"):  # also where the network itself is built without memory, on meta
            options["learn_sigma"] = objective(config).learned_variance
    kind = targets.target("model", options, trusted(config))
    known = {"channels": spec.channels, "num_classes": num_classes, **text_sizes(config, kind)}
    with torch.device("meta"):
        built: Backbone = instantiate("model", options, trusted(config), **known)
    if (name := config["layout"]["name"]) not in built.layouts:
        fitting = " or ".join(built.layouts)
        raise ValueError(f"layout={name} does not fit {type(built).__name__}; choose layout={fitting}")
    if torch.get_default_device().type != "meta":
        built.materialise(Rng(config["seed"], "initialise"))
    return built


def objective(config: Config) -> Objective:
    """The objective of a configuration, checked against its sampler."""
    built: Objective = instantiate("objective", config["objective"], trusted(config))
    chosen = sampler(config)
    if chosen.needs not in built.gives:
        every = [sampler({"sampler": compose.read_option("sampler", name)}) for name in compose.option_names("sampler")]
        fitting = " or ".join(other.name for other in every if other.needs in built.gives)
        raise ValueError(f"sampler={chosen.name} cannot sample objective={built.name}; choose sampler={fitting}")
    return built


def sampler(config: Config) -> Sampler:
    """The sampler of a configuration."""
    options = compose.fill_option("sampler", config["sampler"])
    name, steps = options.pop("name", None), options.pop("steps", None)
    bound = partial("sampler", options, trusted(config))
    if not isinstance(bound.func, Sampler):
        raise ValueError(f"sampler.{TARGET}={options[TARGET]} is not declared by @genfound.samplers.sampler(needs=...)")
    return bound.func.configured(name or bound.func.function.__name__, steps, bound.keywords)


def guidance(config: Config, **nets: Any) -> GuidanceOf | None:
    """The guidance of a configuration, for `Objective.field`; its other network, if it has one, is given."""
    filled = compose.fill_option("guidance", config["guidance"])
    if TARGET not in filled:
        return None
    options = {key: value for key, value in filled.items() if key not in ("name", "weights")}
    return functools.partial(partial("guidance", options, trusted(config)), **nets)


def layout(config: Config, backbone: Backbone, splits: Sequence[ImageSource], spec: LatentSpec) -> Layout:
    """The layout of training and held-out images, of static shape."""
    patch, static, null = config["model"]["patch_size"], dict[str, Any](), backbone.null_label or 0
    name, budget = config["layout"]["name"], config["data"]["max_tokens"]
    if name == "dense":
        if len(np.unique(np.concatenate([images.sizes for images in splits]), axis=0)) > 1:
            raise ValueError("layout=dense needs images of one size; set data.view=square, or layout=packed")
        static = {"max_images": batch_size(config), "filler_label": null}
    elif name == "padded":
        static = {"max_tokens": max(int(token_counts(images, spec, patch).max(initial=0)) for images in splits)}
    elif name == "packed":
        limit = max_images(token_counts(splits[0], spec, patch), budget)
        static = {"max_tokens": budget, "max_images": limit, "filler_label": null}
    return sampling_layout(config, **static)


def sampling_layout(config: Config, **static: int) -> Layout:
    """The layout of a sampling batch, whose images have one size; with `static`, of a static shape."""
    options = dict(config["layout"])
    name = options.pop("name", None)
    if TARGET not in options:  # as in configurations of before
        options[TARGET] = compose.read_option("layout", name)[TARGET]
    return instantiate("layout", options, trusted(config), patch_size=config["model"]["patch_size"], **static)


def plan(config: Config, images: ImageSource, spec: LatentSpec, weight: str, ranks: int, seed: int) -> Plan:
    """The global steps over a source; a pack has at most twice as many images as it holds on average."""
    tokens = token_counts(images, spec, config["model"]["patch_size"])
    order = Order(len(tokens), seed)
    grouper: Batcher
    if config["layout"]["name"] == "dense":
        grouper = FixedBatcher(batch_size(config))
    else:
        budget = token_budget(config, tokens)
        grouper = Packer(lambda k: int(tokens[order[k]]), budget, max_images(tokens, budget))
    if repeated := config["trainer"]["overfit_batches"]:
        grouper = Repeated(grouper, repeated)
    return Plan(order, tokens, grouper, micro_batches(config, ranks), weight, seed)


def published_spec(config: Config) -> LatentSpec:
    """The shape of the latents of a configuration's tokenizer, as published; its weights are not needed."""
    return targets.target("tokenizer", config["tokenizer"], trusted(config)).published


def name_of(options: Mapping[str, Any]) -> str:
    """The name of the file of a group's class, which is that of its option."""
    return str(options["_target_"]).split(".")[-2]
