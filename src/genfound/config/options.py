"""Which settings of a run make sense, and where keys have gone."""

import inspect
import re
from collections.abc import Mapping
from math import gcd
from typing import Any

from genfound.config import compose
from genfound.config.checks import accelerator, integer, number, one_of, texts

MOVED = {
    "trainer.log_every": "trainer.log_every_n_steps (steps)",
    "trainer.checkpoint_every": "callbacks.checkpointing.every (images)",
    "trainer.keep": "callbacks.checkpointing.keep",
    "trainer.val_every": "callbacks.validation.every (images)",
    "trainer.val_images": "callbacks.validation.images",
    "trainer.preview_every": "callbacks.preview.every (images)",
    "trainer.eval_every": "callbacks.evaluation.every (images)",
    "trainer.eval_protocol": "callbacks.evaluation.protocol",
    "trainer.eval_extractor": "callbacks.evaluation.extractor",
    "trainer.eval_extractor_weights": "callbacks.evaluation.extractor_weights",
    "trainer.nonfinite_limit": "callbacks.nonfinite.limit",
    "trainer.compile": "compile",
    "logger.project": "logger.wandb.project",
    "logger.name": "the group, logger=wandb, tensorboard, csv or jsonl",
    "data.source": "data=latent_store, nit_latents or lightningdit_latents",
    "optimizer.warmup_from_zero": "optimizer.warmup_start, 0.0 where it was true",
    "launcher": "Hydra's group, hydra/launcher=...",
}
"""Keys of earlier versions, and what replaces them."""

ELSEWHERE = {
    "model.hidden_size": "set model.width",
    "model.num_layers": "set model.depth",
    "model.class_dropout_prob": "set model.label_drop",
    "lr": "set optimizer.lr",
    "learning_rate": "set optimizer.lr",
    "batch_size": "set batch.images (dense layout) or batch.packs, the global step",
    "epochs": "set budget.images",
    "max_steps": "set trainer.max_steps",
    "ckpt_path": "the same command continues a stopped run, and init_from=PATH starts from other weights",
    "resume": "the same command continues a stopped run",
    "trainer.gpus": "set trainer.devices",
    "trainer.resume_from_checkpoint": "the same command continues a stopped run",
    "cfg_scale": "set guidance.scale",
    "num_sampling_steps": "set sampler.steps",
}
"""Keys that other code bases have, and what they are here."""

OTHER_KEYS = {
    "strategy": "choose strategy=auto, ddp or fsdp",
    "logger": "choose logger=wandb, tensorboard, csv or jsonl, or a list of them",
    "callbacks": "choose callbacks=[default,mine], with conf/callbacks/mine.yaml in --config-dir",
    "plugins": "set trainer.precision, or choose strategy=auto, ddp or fsdp",
    "barebones": "choose logger=jsonl, and take callbacks away with callbacks.NAME=null",
    "model_registry": "W&B keeps artifacts; checkpoints are files of the run directory",
    "default_root_dir": "set runs, study or name",
    "enable_checkpointing": "set callbacks.checkpointing.every",
    "accumulate_grad_batches": "set batch.packs or batch.images, the global step over all devices",
    "gradient_clip_val": "set optimizer.clip",
    "gradient_clip_algorithm": "set optimizer.clip, which clips the norm",
    "max_epochs": "set budget.images or trainer.max_steps",
    "min_epochs": "set budget.images",
    "min_steps": "set budget.images",
    "limit_train_batches": "set budget.images, trainer.max_steps or trainer.overfit_batches",
    "limit_val_batches": "set callbacks.validation.images",
    "limit_test_batches": "nothing is tested while training; see genfound.evaluate",
    "limit_predict_batches": "nothing is predicted while training; see genfound.sample",
    "val_check_interval": "set callbacks.validation.every, in images",
    "check_val_every_n_epoch": "set callbacks.validation.every, in images",
    "num_sanity_val_steps": "set callbacks.validation.every, in images",
    "reload_dataloaders_every_n_epochs": "the order of the images is endless and has no epochs",
    "use_distributed_sampler": "ranks share out the images of a global step themselves",
}
"""Arguments of lightning.Trainer that would fight keys of genfound, and what to do instead."""

AT_LEAST = {
    "trainer": {"devices": 1, "num_nodes": 1, "log_every_n_steps": 1, "overfit_batches": 0},
    "sample": {"batch": 1},
    "optimizer": {"warmup_images": 0, "tokens_per_step": 1, "images_per_step": 1, "budget_images": 1},
    "data": {"num_workers": 0, "max_tokens": 1},
}
"""Whole numbers of a run, and the least that each may be."""

OF_CALLBACKS = {
    "nonfinite": ("limit",), "validation": ("every", "images"), "evaluation": ("every",), "preview": ("every",),
    "checkpointing": ("every", "keep"),
}  # fmt: skip
"""Whole numbers of at least 1 of the callbacks that there are; without `every` they do nothing."""

PROFILERS = ("simple", "advanced", "pytorch")
"""Of Lightning, by name."""

OR_NULL = (("trainer", "max_steps"), ("budget", "images"), ("batch", "packs"), ("batch", "images"))
"""Whole numbers of at least 1, or null."""

SIZES = {"depth", "width", "heads", "patch_size", "states", "expand", "gate_rank", "context_width", "experts", "top_k"}
"""Whole numbers of at least 1 of the models that have them."""

FACTORS = {"mlp_ratio", "expand_k", "expand_v", "gate_normalizer", "rope_theta", "time_shifting"}
"""Numbers above 0 of the models that have them."""


def elsewhere(key: str) -> str | None:
    """What is said of a key of earlier versions or of other code bases."""
    if key in MOVED:
        return f"{key} has moved; set {MOVED[key]}"
    return f"unknown key {key}; {ELSEWHERE[key]}" if key in ELSEWHERE else None


def check(config: Mapping[str, Any]) -> None:
    """Raise a ValueError for a setting of the run that makes no sense."""
    for group, keys in AT_LEAST.items():
        for key, least in keys.items():
            integer(f"{group}.{key}", config[group][key], least)
    for group, key in OR_NULL:
        integer(f"{group}.{key}", config[group][key], 1, or_null=True)
    integer("seed", config["seed"], 0)
    _check_trainer(config)
    decays, model, optimizer = config["ema"]["decays"], config["model"], config["optimizer"]
    if not isinstance(decays, list | None):
        raise ValueError(f"ema.decays={decays} must be a list, such as [0.9999,0.999]")
    if not isinstance(warmup := config["ema"]["warmup"], bool | None):
        raise ValueError(f"ema.warmup={warmup} must be true, false or null")
    _check_optimizer(optimizer)
    for key, value in (("ema.decays", decays or ()), ("optimizer.betas", optimizer["betas"])):
        for decay in value:
            number(key, decay, 0, 1)
    _check_model(model)
    _check_expert_parallel(config)
    read, other = ("images", "packs") if config["layout"]["name"] == "dense" else ("packs", "images")
    if config["batch"][read] is None and config["batch"][other] is not None:  # both are for a sweep over layouts
        raise ValueError(f"batch.{other} counts nothing in layout={config['layout']['name']}; set batch.{read}")


def _check_model(model: Mapping[str, Any]) -> None:
    for key in SIZES & model.keys():
        integer(f"model.{key}", model[key], 1)
    for key in FACTORS & model.keys():
        number(f"model.{key}", model[key], 0, above=True)
    for key in ("shared_experts", "in_context_start"):
        integer(f"model.{key}", model.get(key, 0), 0)
    integer("model.adaln_rank", model.get("adaln_rank"), 1, or_null=True)
    if not isinstance(every := model.get("activation_checkpointing", False), bool):
        integer("model.activation_checkpointing", every, 1)
    number("model.balance", model.get("balance", 0), 0)
    number("model.label_drop", model["label_drop"], 0, 1)


def sharded(config: Mapping[str, Any], ranks: int) -> bool:
    """Whether each of several processes keeps a part of the network (`strategy=fsdp`)."""
    fsdp = compose.read_option("strategy", "fsdp")[compose.TARGET]
    return ranks > 1 and (config["strategy"] or {}).get(compose.TARGET) == fsdp


def world_size(config: Mapping[str, Any]) -> int:
    """Processes of a training, on all of its machines."""
    return int(config["trainer"]["devices"] * config["trainer"]["num_nodes"])


def expert_shares(config: Mapping[str, Any]) -> list[int]:
    """What `strategy.expert_parallel` may be: copies of the experts are whole, and can divide each expert's weights."""
    model, ranks = config["model"], world_size(config)
    if not isinstance(experts := model.get("experts"), int):
        return [1]
    sizes = (model["width"], int(model["width"] * model["mlp_ratio"]))
    whole = [share for share in range(1, experts + 1) if gcd(ranks, experts) % share == 0]
    return [share for share in whole if share == 1 or any(size % (ranks // share) == 0 for size in sizes)]


def _check_expert_parallel(config: Mapping[str, Any]) -> None:
    key, share, experts = "strategy.expert_parallel", expert_parallel(config), config["model"].get("experts")
    integer(key, share, 1)
    if share > 1 and experts is None:
        raise ValueError(f"{key}={share} divides experts, and this model has none; set {key}=1")
    if share not in (legal := expert_shares(config)):
        ranks = world_size(config)
        way = "set trainer.devices" if ranks == 1 else f"choose one of {', '.join(map(str, legal))}"
        raise ValueError(
            f"{key}={share} must divide trainer.devices x num_nodes, {ranks}, and model.experts={experts}, and so many "
            f"copies as there are then must divide model.width; {way}"
        )


def expert_parallel(config: Mapping[str, Any]) -> Any:
    """How many processes share a copy of the experts."""
    return (config["strategy"] or {}).get("expert_parallel", 1)


def text_sizes(config: Mapping[str, Any], model: Any) -> dict[str, int]:
    """What a model must know of the text encoder, `text_width` and `text_tokens`; nothing for one that reads no text.

    Raises:
        ValueError: there is none, or one that nothing reads.
    """
    encoder = config.get("text_encoder") or {}
    if "text_width" not in inspect.signature(model).parameters:
        if encoder:
            way = "set text_encoder=none, or choose a model of text such as nit_t2i_xl"
            raise ValueError(f"text_encoder: {model.__name__} reads no captions; {way}")
        return {}
    if not encoder:
        raise ValueError(f"text_encoder=none, but {model.__name__} reads captions; choose text_encoder=gemma3_1b")
    for key in ("width", "tokens"):
        integer(f"text_encoder.{key}", encoder.get(key), 1)
    return {"text_width": encoder["width"], "text_tokens": encoder["tokens"]}


def _check_optimizer(optimizer: Mapping[str, Any]) -> None:
    published = optimizer["ema_decay"]
    for decay in published if isinstance(published, list) else [published]:
        number("optimizer.ema_decay", decay, 0, 1)
    rates = ["lr" if optimizer["lr"] is not None or "base_lr" not in optimizer else "base_lr"]
    for key in (*rates, "weight_decay", *({"min_lr", "warmup_start"} & optimizer.keys())):
        number(f"optimizer.{key}", optimizer[key], 0)
    if optimizer["clip"] is not None:
        number("optimizer.clip", optimizer["clip"], 0, above=True)
    if not isinstance(betas := optimizer["betas"], list) or len(betas) != 2:
        raise ValueError(f"optimizer.betas={betas} must be two numbers, such as [0.9,0.999]")
    if optimizer.get("trainable") is not None:
        texts("optimizer.trainable", optimizer["trainable"], "parts of names, such as [adaLN,bias], or null")
    if "matrices" in optimizer:  # those of Muon
        texts("optimizer.matrices", optimizer["matrices"], "parts of names, such as [blocks]")
        number("optimizer.momentum", optimizer["momentum"], 0, 1)
        integer("optimizer.ns_steps", optimizer["ns_steps"], 1)
        number("optimizer.ns_steps", optimizer["ns_steps"], 1, 99)  # torch.optim.Muon's own limit


def ema_decays(config: Mapping[str, Any]) -> list[float]:
    """Those of `ema.decays`, or of the recipe."""
    published = config["optimizer"]["ema_decay"]
    published = published if isinstance(published, list) else [published]
    return list(published if config["ema"]["decays"] is None else config["ema"]["decays"])


def one_step(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of trainer.fast_dev_run: one global step, then every callback but evaluation, no logger."""
    groups = config["callbacks"].items()
    callbacks = {name: {**own, "every": 1} if own and own.get("every") else own for name, own in groups}
    for name, few in (("validation", {"images": config["sample"]["batch"]}), ("evaluation", {"every": None})):
        if callbacks.get(name):
            callbacks[name] |= few
    return {**config, "logger": {}, "callbacks": callbacks, "trainer": {**config["trainer"], "max_steps": 1}}


def _check_trainer(config: Mapping[str, Any]) -> None:
    for key, instead in OTHER_KEYS.items():
        if config["trainer"].get(key) is not None:
            raise ValueError(f"trainer.{key} cannot be set: {instead}")
    accelerator("trainer.accelerator", config["trainer"]["accelerator"])
    one_of("trainer.precision", config["trainer"]["precision"], ("auto", "bf16", "fp32"))
    profiler, limit = config["trainer"]["profiler"], config["trainer"]["max_time"]
    if profiler not in (None, *PROFILERS):
        raise ValueError(f"trainer.profiler={profiler} is unknown; choose {', '.join(PROFILERS)} or null")
    if limit is not None and not re.fullmatch(r"\d+:\d\d:\d\d:\d\d", str(limit)):
        raise ValueError(f"trainer.max_time={limit} must be days:hours:minutes:seconds, as 01:12:00:00, or null")
    if (dtype := (config["strategy"] or {}).get("reduce_dtype")) not in (None, "bf16"):
        raise ValueError(f"strategy.reduce_dtype={dtype} must be bf16 or null (float32, as gradients are)")
    if config["compile"] not in (True, False, "auto"):
        raise ValueError(f"compile={config['compile']} must be auto, true or false")
    callbacks = config["callbacks"]
    for name, instead in (("ema", "ema.decays=[]"), ("checkpointing", "callbacks.checkpointing.every=...")):
        if callbacks.get(name) is None:
            raise ValueError(
                f"callbacks.{name} is part of every run (callbacks=[default,mine] adds to those there are); to have "
                f"less of it, set {instead}"
            )
    for name, keys in OF_CALLBACKS.items():
        for key in keys if callbacks.get(name) is not None else ():
            or_null = key == "every" and name != "checkpointing"
            integer(f"callbacks.{name}.{key}", callbacks[name][key], 1, or_null)
    if not isinstance(asynchronous := callbacks["checkpointing"].get("asynchronous"), bool | None):
        raise ValueError(f"callbacks.checkpointing.asynchronous={asynchronous} must be true or false")
