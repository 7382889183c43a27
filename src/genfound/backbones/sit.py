"""SiT, the scalable interpolant transformer (arXiv 2401.08740): DiT's network, trained on a continuous time.

Two things differ from DiT. Time runs from 0 (noise) to 1 (data) and enters the sinusoids as it is. And the
released networks make 2 C output channels, of which only the first C are ever used (models.py:SiT.forward).
"""

from functools import partial
from typing import Any

from genfound.backbones.dit import Block, DiT
from genfound.config.checks import one_of


class SiT(DiT):
    """The velocity, score or noise of every latent pixel, given time and class.

    Args:
        time: `data1`, from noise to data, as SiT is released; `data0`, the other way round, as REPA releases it.
        qk_norm: LayerNorm on each head's queries and keys (REPA's models/sit.py).
        options: as of `DiT`.
    """

    def __init__(self, *, time: str = "data1", qk_norm: bool = False, **options: Any) -> None:
        self.time = one_of("model.time", time, ("data1", "data0"))
        super().__init__(**options, make_block=partial(Block, qk_norm=qk_norm))
