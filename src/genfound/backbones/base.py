"""What a backbone tells the rest of the house about itself."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from genfound.batch import Batch
from genfound.layers.embed import TimeEmbedding
from genfound.layers.experts import Experts, Router
from genfound.layers.initial import Draw
from genfound.rng import Rng


class TokenSpec(NamedTuple):
    """What a token is made of: a patch of `patch_size` squared latent pixels of `channels` channels."""

    channels: int
    patch_size: int


class Backbone(nn.Module):
    """A network of (batch, t) -> tensor shaped like `batch.x`.

    It knows no objective, noise, guidance or tokenizer, and holds no frozen network.

    Attributes:
        layouts: names of the memory layouts it takes.
        time: `data0`, t from 0 (data) to 1 (noise); `data1`, reversed; or `index`, integer steps.
        token_spec: what its tokens are made of.
        null_label: the label that means "no label", or None.
    """

    layouts: tuple[str, ...]
    time: str
    token_spec: TokenSpec
    null_label: int | None

    def forward(self, batch: Batch, t: Tensor) -> Tensor:
        """Prediction for `batch.x` at times t (B,)."""
        raise TypeError(f"{type(self).__name__} does not define forward")

    def initialise(self, rng: Rng | None = None) -> None:
        """Set all parameters: Xavier-uniform matrices, normal(0.02) embeddings, biases 0, norms 1.

        A backbone with buffers, other parameters or other laws, e.g. zeros where blocks start as identity, extends it.

        Args:
            rng: of the draws, see `Draw`.
        """
        draw = Draw(self, rng)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                draw(nn.init.xavier_uniform_, module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                draw(nn.init.normal_, module.weight, std=0.02)
            elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                module.reset_parameters()
            elif isinstance(module, (Experts, Router)):
                module.initialise(draw)
        for module in self.modules():
            if isinstance(module, TimeEmbedding):
                for layer in (module.first, module.second):
                    draw(nn.init.normal_, layer.weight, std=0.02)

    @torch.no_grad()
    def materialise(self, rng: Rng) -> None:
        """Give a network that was built on `meta` memory on the default device, and its initial values.

        Raises:
            ValueError: `initialise` does not set all of it.
        """
        self.to_empty(device=torch.get_default_device())
        own = [(name, x.view(-1)[:1]) for name, x in chain(self.named_parameters(), self.named_buffers())]
        own = [(name, first) for name, first in own if first.is_floating_point()]
        for _, first in own:
            first.fill_(torch.nan)
        self.initialise(rng)
        for name, first in own:
            if first.isnan().any():
                raise ValueError(f"{type(self).__name__}.initialise must set every parameter and buffer, also {name}")

    def extra_losses(self) -> dict[str, Tensor]:
        """Named scalars of the last training forward that are added to the loss, once for each global step."""
        return {}

    def diagnostics(self) -> dict[str, Tensor]:
        """Named scalars of the last forward for the dashboard."""
        return {}

    def param_groups(self) -> Iterable[Any]:
        """Parameter groups of the optimizer."""
        return self.parameters()
