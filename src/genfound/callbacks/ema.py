"""Exponential moving averages of the weights, in float32, beside the live ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from genfound.modules.base import GenerativeModule


class Ema(lightning.Callback):
    """Averages with one or several decays; they start as copies of the initial weights.

    `state_dict` of the module stays the live weights; the averages are the checkpoint's key `ema`,
    {decay: {parameter: tensor}}.

    Args:
        decays: e.g. [0.9999]; the first is the one that previews and samples use.
    """

    def __init__(self, decays: Sequence[float]) -> None:
        self.decays = list(decays)
        self.averages: dict[float, dict[str, Tensor]] = {}
        self._saved: Mapping[str, Mapping[str, Tensor]] | None = None
        self._steps = 0

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the averages of the checkpoint until training starts."""
        saved, names = checkpoint.get("ema", {}), {name for name, _ in _trained(module)}
        missing = [decay for decay in self.decays if str(decay) not in saved]
        if missing:
            raise ValueError(f"ema.decays={self.decays}, but the checkpoint has only {', '.join(saved) or 'none'}")
        if any(saved[str(decay)].keys() != names for decay in self.decays):
            raise ValueError("the averages in the checkpoint belong to other parameters")
        self._saved = saved

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Begin with the weights, or the averages of the checkpoint, where the weights are.

        Only now has Lightning restored everything, and moved it to the device.
        """
        for decay in self.decays:
            weights = dict(_trained(module)) if self._saved is None else self._saved[str(decay)]
            self.averages[decay] = {
                name: weights[name].detach().to(p.device, torch.float32, copy=True) for name, p in _trained(module)
            }
        self._saved = None
        self._steps = trainer.global_step

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the averages."""
        checkpoint["ema"] = {str(decay): average for decay, average in self.averages.items()}

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update after each optimizer step."""
        if trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        live = [p.detach().float() for _, p in _trained(module)]
        for decay, average in self.averages.items():
            torch._foreach_lerp_(list(average.values()), live, 1 - decay)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """The metrics of the first average, with the suffix `_ema`, beside those of the live weights."""
        if self.averages and not trainer.sanity_checking:
            module.log_dict(self.validate(module))

    def validate(self, module: lightning.LightningModule) -> dict[str, float]:
        """The metrics of `GenerativeModule.validate` with the first average, each with the suffix `_ema`."""
        assert isinstance(module, GenerativeModule)
        with self.ema_weights(module):
            return {f"{name}_ema": value for name, value in module.validate().items()}

    @contextmanager
    def ema_weights(self, module: lightning.LightningModule) -> Iterator[None]:
        """Within this context the network holds the first average."""
        if not self.decays:
            yield
            return
        average = self.averages[self.decays[0]]
        live = {name: p.detach().clone() for name, p in _trained(module)}
        _copy(module, average)
        try:
            yield
        finally:
            _copy(module, live)


def _trained(module: lightning.LightningModule) -> list[tuple[str, nn.Parameter]]:
    assert isinstance(module, GenerativeModule)
    return [(name, p) for name, p in module.net.named_parameters() if p.requires_grad]


@torch.no_grad()
def _copy(module: lightning.LightningModule, values: dict[str, Tensor]) -> None:
    for name, parameter in _trained(module):
        parameter.copy_(values[name])
