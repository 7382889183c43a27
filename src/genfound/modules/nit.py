"""NiT: flow matching on packs of images at their native sizes, each token counting alike."""

from genfound.backbones.nit import NiT
from genfound.modules.base import GenerativeModule


class NiTModule(GenerativeModule):
    """Trains a NiT."""

    backbone = NiT
