"""DiG: the noise of gated linear attention, at the cost of a recurrence."""

from genfound.backbones.dig import DiG
from genfound.modules.base import GenerativeModule


class DiGModule(GenerativeModule):
    """Trains a DiG."""

    backbone = DiG
