"""REPA (arXiv 2410.06940) and iREPA (arXiv 2512.10794): the alignment loss and its projectors."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from genfound.alignment.projectors import ConvProjector, make_projector
from genfound.backbones.base import Backbone
from genfound.batch import Batch
from genfound.config.checks import integer, number
from genfound.layers.adaln import autocast_off
from genfound.layers.initial import Draw
from genfound.objectives.base import Losses
from genfound.rng import Rng


class Alignment(nn.Module):
    """weight * (1 - cosine similarity) of the projected tokens of a block and the features of a teacher.

    The mean over an image's tokens, and over teachers, is added to the loss of the image; so images count as the
    objective has them count: each alike as in REPA, or by their tokens as in NiT's loss.py. (REPA writes minus the
    similarity, which has the same gradients.) The projectors are trained, averaged and saved beside the network.

    Args:
        width: D, of the backbone's tokens.
        widths: Z, of each teacher's features.
        weight: of the loss.
        depth: number of the block whose output is projected, from 1.
        projector: `mlp` (REPA's, of two hidden layers), `linear`, or `conv` (iREPA's).
        hidden: width of the hidden layers of `mlp`.
        kernel: side of `conv`.

    Raises:
        ValueError: an option is out of range; the message names its key.
    """

    def __init__(
        self, *, width: int, widths: Mapping[str, int], weight: float, depth: int, projector: str, hidden: int,
        kernel: int,
    ) -> None:  # fmt: skip
        super().__init__()
        for key, value in {"depth": depth, **{f"teachers.{name}.width": z for name, z in widths.items()}}.items():
            integer(f"alignment.{key}", value, 1)
        self.weight = number("alignment.weight", weight, 0, above=True)
        self.depth, self.widths = depth, list(widths.values())
        self.projectors = nn.ModuleList(make_projector(projector, width, hidden, z, kernel) for z in self.widths)
        self._hidden: Tensor | None = None

    def initialise(self, rng: Rng) -> None:
        """Xavier-uniform matrices and zero biases; convolutions as PyTorch's own (iREPA's rule knows only matrices)."""
        draw = Draw(self, rng)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                draw(nn.init.xavier_uniform_, module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, ConvProjector):
                bound = 1 / math.sqrt(module.weight[0].numel())
                draw(nn.init.kaiming_uniform_, module.weight, a=math.sqrt(5))
                draw(nn.init.uniform_, module.bias, a=-bound, b=bound)

    @contextmanager
    def watching(self, net: Backbone, batch: Batch) -> Iterator[None]:
        """Within this context the tokens of the images that leave the block are kept for `added`."""

        left: list[Tensor] = []  # and nothing is done with it there: a block is computed twice by checkpointing

        def keep(block: nn.Module, inputs: object, out: Tensor | tuple[Tensor, ...]) -> None:
            left.append(out if isinstance(out, Tensor) else out[0])

        handle = net.blocks[self.depth - 1].register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()
        self._hidden = net.image_tokens(left[0], self.depth - 1, batch)

    def added(self, losses: Losses, batch: Batch) -> Losses:
        """Losses with that of the alignment, of the tokens that were kept; `terms` has both parts.

        A batch without features is not aligned: its part is zero, and so are the gradients of the projectors, which
        processes expect of each other.
        """
        hidden, self._hidden = self._hidden, None
        assert hidden is not None
        share = self.weight if batch.features else 0.0
        if not batch.features:
            batch = replace(batch, features=tuple(hidden.new_zeros(*hidden.shape[:-1], z) for z in self.widths))
        aligned = share * self(hidden, batch)
        terms = {**(losses.terms or {"objective": losses.total}), "alignment": aligned}
        return replace(losses, total=losses.total + aligned, terms=terms)

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Hidden tokens, packed (T, D) or (B, N, D) -> (B,) mean of 1 - cosine similarity; 0 where not real."""
        apart = []
        for projector, target in zip(self.projectors, batch.features, strict=True):
            projected = projector(hidden, batch)
            with autocast_off(projected):
                similarity = cosine_similarity(projected.float(), target.float(), dim=-1)
            apart.append(batch.per_image((1 - similarity)[..., None]))
        return torch.stack(apart).mean(dim=0)
