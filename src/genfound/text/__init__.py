"""Frozen text encoders, which make of captions what models of text read."""

from genfound.text.base import TextEncoder

__all__ = ["TextEncoder"]
