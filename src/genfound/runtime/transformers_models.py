"""Frozen networks that the library transformers computes: vision encoders, text encoders, CLIP."""

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

FILES = ("config.json", "model.safetensors")
"""Of a model of transformers on the Hugging Face hub."""


def require(key: str, name: str) -> None:
    """Raise a ValueError, for a key of the configuration and what is named there, if the library is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise ValueError(f"{key}: {name} needs a library; pip install 'genfound[teachers]'")


def transformers_class(name: str) -> Any:
    """A class of transformers, whose progress bars and hints are silenced."""
    library = importlib.import_module("transformers")
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    return getattr(library, name)


def from_state(kind: str, config: Mapping[str, Any], state: Mapping[str, Tensor] | None) -> Any:
    """A network of transformers with the weights of a state dict, named as the hub's files are, or random ones."""
    described = transformers_class(f"{kind}Config")(**config)
    model_class = transformers_class(f"{kind}Model")
    if state is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return model_class(described)
    model, info = model_class.from_pretrained(None, config=described, state_dict=dict(state), output_loading_info=True)
    return complete(model, info, "the weights")


def complete(model: Any, info: Mapping[str, Any], origin: str) -> Any:
    """The model, if all of its weights were there."""
    if wrong := sorted([*info["missing_keys"], *info["unexpected_keys"]]):
        raise ValueError(f"{origin} are of another network: {len(wrong)} names differ, such as {wrong[0]}")
    return model
