"""What a backbone tells the rest of the house about itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from genfound.batch import Batch


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

    def extra_losses(self) -> dict[str, Tensor]:
        """Named scalars of the last training forward that are added to the loss, once for each global step."""
        return {}

    def diagnostics(self) -> dict[str, Tensor]:
        """Named scalars of the last forward for the dashboard."""
        return {}

    def param_groups(self) -> Iterable[Any]:
        """Parameter groups of the optimizer."""
        return self.parameters()
