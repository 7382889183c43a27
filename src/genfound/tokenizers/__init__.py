"""Tokenizers: frozen maps between images and latents, and the only place where latents are scaled."""

from genfound.tokenizers.base import LatentSpec, Tokenizer, Undecodable
from genfound.tokenizers.pixel import PixelTokenizer

__all__ = ["LatentSpec", "PixelTokenizer", "Tokenizer", "Undecodable"]
