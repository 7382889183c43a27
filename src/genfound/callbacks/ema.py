"""Exponential moving averages of the weights, in float32, beside the live ones."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor

from genfound.config.options import ema_decays
from genfound.layers.initial import local
from genfound.modules.base import GenerativeModule
from genfound.runtime.fsdp import sharded_like


class Ema(Callback):
    """Averages with one or several decays; they start as copies of the initial weights.

    `state_dict` of the module stays the live weights; the averages are the checkpoint's key `ema`,
    {decay: {parameter: tensor}}.

    Args:
        decays: e.g. [0.9999]; the first is the one that previews and samples use. `None`: all of the run's own.
        warmup: after n steps no decay is above (1 + n) / (10 + n), as in TensorFlow's ExponentialMovingAverage, so that
            the average of a short run does not hold its first weights.
    """

    def __init__(self, decays: Sequence[float] | None = None, warmup: bool = False) -> None:
        self.decays, self.warmup = decays, warmup
        self.averages: dict[float, dict[str, Tensor]] = {}
        self._saved: Mapping[str, Mapping[str, Tensor]] | None = None

    def setup(self, trainer: Trainer, module: GenerativeModule, stage: str) -> None:
        """Decays and warm-up of the run, where none were given."""
        if self.decays is None:
            config = trainer.datamodule.parts.config  # type: ignore[attr-defined]
            own, recipe = config["ema"], config["optimizer"]
            self.decays = ema_decays(config)
            self.warmup = recipe["ema_warmup"] if own["warmup"] is None else own["warmup"]

    def on_load_checkpoint(self, trainer: Trainer, module: GenerativeModule, checkpoint: dict[str, Any]) -> None:
        """Keep the averages of the checkpoint until training starts."""
        saved, names = checkpoint.get("ema", {}), {name for name, _ in module.trained()}
        decays = list(self.decays or ())
        missing = [decay for decay in decays if str(decay) not in saved]
        if missing:
            raise ValueError(f"ema.decays={decays}, but the checkpoint has only {', '.join(saved) or 'none'}")
        if any(saved[str(decay)].keys() != names for decay in decays):
            raise ValueError("the averages in the checkpoint belong to other parameters")
        self._saved = saved

    def on_train_start(self, trainer: Trainer, module: GenerativeModule) -> None:
        """Begin with the weights, or the averages of the checkpoint, where the weights are.

        Only now has Lightning restored everything, and moved it to the device.
        """
        live = dict(module.trained())
        for decay in self.decays or ():
            weights = live if self._saved is None else self._saved[str(decay)]
            self.averages[decay] = {
                name: sharded_like(weights[name].detach(), p).to(p.device, torch.float32, copy=True)
                for name, p in live.items()
            }
        self._live, self._saved = list(live.values()), None
        self._steps = trainer.global_step

    def on_save_checkpoint(self, trainer: Trainer, module: GenerativeModule, checkpoint: dict[str, Any]) -> None:
        """Save the averages."""
        checkpoint["ema"] = {str(decay): average for decay, average in self.averages.items()}

    def on_train_batch_end(self, trainer: Trainer, module: GenerativeModule, *_: Any) -> None:
        """Update after each optimizer step."""
        if trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        live = [local(p.detach()).float() for p in self._live]
        most = (1 + self._steps) / (10 + self._steps) if self.warmup else 1.0
        for decay, average in self.averages.items():
            torch._foreach_lerp_([local(value) for value in average.values()], live, 1 - min(decay, most))

    def on_validation_epoch_end(self, trainer: Trainer, module: GenerativeModule) -> None:
        """The metrics of the first average, with the suffix `_ema`, beside those of the live weights."""
        if self.averages and not trainer.sanity_checking:
            module.log_dict(self.validate(module))

    def validate(self, module: GenerativeModule) -> dict[str, float]:
        """The metrics of `GenerativeModule.validate` with the first average, each with the suffix `_ema`."""
        with self.ema_weights(module):
            return {f"{name}_ema": value for name, value in module.validate().items()}

    @contextmanager
    def ema_weights(self, module: GenerativeModule) -> Iterator[None]:
        """Within this context the network holds the first average; its live weights where there is none."""
        live = {name: p.detach().clone() for name, p in module.trained()} if self.averages else {}
        _copy(module, next(iter(self.averages.values()), {}))
        try:
            yield
        finally:
            _copy(module, live)


def the_ema(trainer: Trainer) -> Ema | None:
    """The callback of a run that holds the average, if there is one."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, Ema)), None)  # type: ignore[attr-defined]


@contextmanager
def averaged(trainer: Trainer, module: GenerativeModule) -> Iterator[None]:
    """Within this context the network is in eval mode, and holds the average where a callback has one.

    Each rank copies its own part of it, under FSDP too.
    """
    ema = the_ema(trainer)
    module.eval()
    try:
        with ema.ema_weights(module) if ema else nullcontext():
            yield
    finally:
        module.train()


@torch.no_grad()
def _copy(module: GenerativeModule, values: dict[str, Tensor]) -> None:
    own = dict(module.trained())
    for name, value in values.items():
        own[name].copy_(value)
