"""DiM: a network of larger images begins with the weights of one of smaller images."""

from collections.abc import Mapping
from math import isqrt

from torch import Tensor

from genfound.backbones.dim import CONDITIONS, DiM, resized
from genfound.modules.base import GenerativeModule

POSITIONS = "additional_embed"


class DiMModule(GenerativeModule):
    """Trains a DiM."""

    backbone = DiM
    net: DiM

    def starting_weights(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Learned positions, which are those of a square, are interpolated to this network's."""
        count = state[POSITIONS].shape[1] - CONDITIONS if POSITIONS in state else 0
        grid = (isqrt(count), count // max(isqrt(count), 1))
        if count == self.net.additional_embed.shape[1] - CONDITIONS or grid[0] * grid[1] != count or not count:
            return super().starting_weights(state)
        remark = f"  positions of {grid[0]} x {grid[1]} tokens are interpolated to {'x'.join(map(str, self.net.table))}"
        return {**state, POSITIONS: resized(state[POSITIONS], grid, self.net.table)}, [remark]
