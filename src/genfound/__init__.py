"""genfound: train, ablate, sample and evaluate latent diffusion transformers."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genfound.checkpoints.load import LoadedModel, load
    from genfound.data.datamodule import GenerativeDataModule
    from genfound.modules.base import GenerativeModule
    from genfound.modules.dig import DiGModule
    from genfound.modules.dim import DiMModule
    from genfound.modules.dit import DiTModule
    from genfound.modules.dit_moe import DiTMoEModule
    from genfound.modules.fit import FiTModule
    from genfound.modules.jit import JiTModule
    from genfound.modules.ldm import LDMModule
    from genfound.modules.lightningdit import LightningDiTModule
    from genfound.modules.nit import NiTModule
    from genfound.modules.sit import SiTModule
    from genfound.sampling.pipeline import sample

_PLACES = {
    "LoadedModel": "checkpoints.load", "load": "checkpoints.load", "sample": "sampling.pipeline",
    "GenerativeDataModule": "data.datamodule", "GenerativeModule": "modules.base",
    "DiGModule": "modules.dig",
    "DiMModule": "modules.dim",
    "DiTModule": "modules.dit",
    "DiTMoEModule": "modules.dit_moe",
    "FiTModule": "modules.fit",
    "JiTModule": "modules.jit",
    "LDMModule": "modules.ldm",
    "LightningDiTModule": "modules.lightningdit",
    "NiTModule": "modules.nit",
    "SiTModule": "modules.sit",
}  # fmt: skip

__all__ = [
    "DiGModule", "DiMModule", "DiTMoEModule", "DiTModule", "FiTModule", "GenerativeDataModule", "GenerativeModule",
    "JiTModule", "LDMModule", "LightningDiTModule", "LoadedModel", "NiTModule", "SiTModule", "load", "sample",
]  # fmt: skip
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used, so that `--help` stays quick."""
    if name in _PLACES:
        return getattr(importlib.import_module(f"genfound.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'genfound' has no attribute '{name}'")
