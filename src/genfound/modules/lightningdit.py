"""LightningDiT: flow matching in the latents of VA-VAE, with a loss of the direction too."""

from genfound.backbones.lightningdit import LightningDiT
from genfound.modules.base import GenerativeModule


class LightningDiTModule(GenerativeModule):
    """Trains a LightningDiT."""

    backbone = LightningDiT
