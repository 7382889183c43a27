"""SiT: DiT's network and optimizer under flow matching."""

from genfound.backbones.sit import SiT
from genfound.modules.base import GenerativeModule


class SiTModule(GenerativeModule):
    """Trains a SiT."""

    backbone = SiT
