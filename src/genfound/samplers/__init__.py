"""Samplers: one function and one option each; and guidance."""

from genfound.samplers.base import Sampler, sampler

__all__ = ["Sampler", "sampler"]
