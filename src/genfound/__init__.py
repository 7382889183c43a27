"""genfound: train, ablate, sample and evaluate latent diffusion transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genfound.checkpoints.load import LoadedModel, load
    from genfound.sampling.pipeline import sample

__all__ = ["LoadedModel", "load", "sample"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the public functions when they are first used, so that `--help` stays quick."""
    if name in ("LoadedModel", "load"):
        from genfound.checkpoints import load

        return getattr(load, name)
    if name == "sample":
        from genfound.sampling.pipeline import sample

        return sample
    raise AttributeError(f"module 'genfound' has no attribute '{name}'")
