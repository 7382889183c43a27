"""DiT: DDPM's learned-variance loss by default, all parameters with one AdamW setting, no decay."""

from genfound.backbones.dit import DiT
from genfound.modules.base import GenerativeModule


class DiTModule(GenerativeModule):
    """Trains a DiT."""

    backbone = DiT
