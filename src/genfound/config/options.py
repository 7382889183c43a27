"""Which numbers of a run make sense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from genfound.config.checks import integer, number

AT_LEAST = {
    "trainer": {
        "devices": 1, "log_every": 1, "checkpoint_every": 1, "keep": 1, "val_every": 1, "val_images": 1,
        "preview_every": 1, "nonfinite_limit": 1,
    },
    "sample": {"batch": 1},
    "optimizer": {"warmup_images": 0, "tokens_per_step": 1, "images_per_step": 1, "budget_images": 1},
    "data": {"num_workers": 0, "max_tokens": 1},
}  # fmt: skip
"""Whole numbers of a run, and the least that each may be."""

OR_NULL = (
    ("trainer", "max_steps"), ("trainer", "eval_every"), ("budget", "images"), ("batch", "packs"), ("batch", "images")
)  # fmt: skip
"""Whole numbers of at least 1, or null."""

SIZES = {"depth", "width", "heads", "patch_size"}
"""Whole numbers of at least 1 of the models that have them."""


def check(config: Mapping[str, Any]) -> None:
    """Raise a ValueError for a number of the run that makes no sense."""
    for group, keys in AT_LEAST.items():
        for key, least in keys.items():
            integer(f"{group}.{key}", config[group][key], least)
    for group, key in OR_NULL:
        integer(f"{group}.{key}", config[group][key], 1, or_null=True)
    decays, model, optimizer = config["ema"]["decays"], config["model"], config["optimizer"]
    if not isinstance(decays, list | None):
        raise ValueError(f"ema.decays={decays} must be a list, such as [0.9999,0.999]")
    for key, value in (("ema.decays", decays or ()), ("optimizer.betas", optimizer["betas"])):
        for decay in value:
            number(key, decay, 0, 1)
    for key in SIZES & model.keys():
        integer(f"model.{key}", model[key], 1)
    number("model.label_drop", model["label_drop"], 0, 1)
    number("optimizer.ema_decay", optimizer["ema_decay"], 0, 1)
    for key in ("lr", "weight_decay"):
        number(f"optimizer.{key}", optimizer[key], 0)
    if optimizer["clip"] is not None:
        number("optimizer.clip", optimizer["clip"], 0, above=True)
    read, other = ("images", "packs") if config["layout"]["name"] == "dense" else ("packs", "images")
    if config["batch"][read] is None and config["batch"][other] is not None:  # both are for a sweep over layouts
        raise ValueError(f"batch.{other} counts nothing in layout={config['layout']['name']}; set batch.{read}")
