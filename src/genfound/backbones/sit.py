"""SiT, the scalable interpolant transformer (arXiv 2401.08740): DiT's network, trained on a continuous time.

Two things differ from DiT. Time runs from 0 (noise) to 1 (data) and enters the sinusoids as it is. And the
released networks make 2 C output channels, of which only the first C are ever used (models.py:SiT.forward).
"""

from genfound.backbones.dit import DiT


class SiT(DiT):
    """The velocity, score or noise of every latent pixel, given time and class; options as of `DiT`."""

    time = "data1"
