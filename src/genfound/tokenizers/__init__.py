"""Tokenizers: frozen maps between images and latents, and the only place where latents are scaled."""

from genfound.tokenizers.base import LatentSpec, Tokenizer
from genfound.tokenizers.pixel import PixelTokenizer
from genfound.tokenizers.undecodable import Undecodable

__all__ = ["LatentSpec", "PixelTokenizer", "Tokenizer", "Undecodable"]
