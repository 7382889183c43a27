"""Tokenizers: frozen maps between images and latents, and the only place where latents are scaled."""

from genfound.tokenizers.absent import Absent
from genfound.tokenizers.base import Spec, Tokenizer
from genfound.tokenizers.pixel import Pixel

__all__ = ["Absent", "Pixel", "Spec", "Tokenizer"]
