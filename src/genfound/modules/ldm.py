"""LDM: the noise of a U-Net, the baseline of the lineage."""

from genfound.backbones.ldm import LDM
from genfound.modules.base import GenerativeModule


class LDMModule(GenerativeModule):
    """Trains an LDM."""

    backbone = LDM
