"""What makes a backbone a model of diffusers, and its parameters have released names and shapes.

`source` copies this into folders, and nothing here imports it; there it needs torch and diffusers alone.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear

from genfound.batch import Batch
from genfound.layers.attention import _packed, _rows, sdpa
from genfound.layers.moe import Expert, Routing

SOURCE = Path(__file__).read_text(encoding="utf-8")
"""Of this file, for a pipeline that is saved again."""


class FolderTransformer(ModelMixin, ConfigMixin):
    """A backbone in diffusers' sockets; classes derive from it first, and from their backbone second."""

    layout_class: type[Any]  # of `Layout`
    _gradient_checkpointing_func = None

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Latents (B, C, h, w) of one size, times (B,) in the network's own unit, labels (B,) -> its output.

        Weights in half precision are rounded, and so are the products with them; all else is float32, as in training.
        """
        if self.dtype != torch.float32:
            weights = {name: parameter.float() for name, parameter in self.named_parameters()}
            inputs = (hidden_states.float(), timestep, class_labels, return_dict)
            with torch.autocast(hidden_states.device.type, self.dtype):
                return functional_call(self, weights, inputs)
        backbone: Any = super()
        layout = self.layout_class(self.token_spec.patch_size)
        batch = layout.to_batch(list(hidden_states), class_labels)
        out = torch.stack(layout.to_latents(backbone.forward(batch, timestep.float()), batch))
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)


class PatchConvolution(nn.Conv2d):
    """The released patch projection, for patches that are cut already."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C p p) -> (..., D)."""
        return linear(x, self.weight.flatten(1), self.bias)


class PatchOutput(nn.Linear):
    """The released last layer, whose outputs are in the order (p, p, channel)."""

    def __init__(self, width: int, token: int, patch_size: int) -> None:
        super().__init__(width, token)
        self.patch_size = patch_size

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., K p p)."""
        patch = super().forward(x).unflatten(-1, (self.patch_size, self.patch_size, -1))
        return patch.movedim(-1, -3).flatten(-3)


class Experts(nn.ModuleList):
    """Routed experts, each with matrices of its own."""

    def __init__(self, width: int, hidden: int, experts: int) -> None:
        super().__init__(Expert(width, hidden) for _ in range(experts))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x (B, N, D) -> (B, N, D), the weighted sum of the chosen experts."""
        out = torch.zeros_like(x, dtype=torch.float32)
        for number, expert in enumerate(self):
            chosen = (routing.choices == number).nonzero(as_tuple=True)  # image, token, and which choice of it
            image, token, _ = chosen
            out[image, token] += expert(x[image, token]) * routing.weights[chosen][:, None]
        return out


def multiply_add(base: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """base + x * factor, which broadcast."""
    return torch.addcmul(base, x, factor)


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, backend: str, block_mask: None = None
) -> Tensor:
    """Softmax attention within each row of a packed sequence, (T, H, d); rows of equal length share a call."""
    return _packed([sdpa(a, b, c) for a, b, c in _rows(cu_seqlens, [q], [k, v])])


def with_block_mask(batch: Batch, tokens: Tensor, backend: str) -> Batch:
    """The batch, which needs none."""
    return batch
