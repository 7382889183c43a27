"""Tokenizers: frozen maps between images and latents, and the only place where latents are scaled."""

from genfound.tokenizers.base import Spec, Tokenizer
from genfound.tokenizers.pixel import Pixel
from genfound.tokenizers.undecodable import Absent

__all__ = ["Absent", "Pixel", "Spec", "Tokenizer"]
