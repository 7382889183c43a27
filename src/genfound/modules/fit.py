"""FiT and FiTv2; FiTv2-HR trains the part of the parameters that `optimizer.trainable` names."""

from genfound.backbones.fit import FiT
from genfound.modules.base import GenerativeModule


class FiTModule(GenerativeModule):
    """Trains a FiT."""

    backbone = FiT
