"""Memory layouts: how latents of several images lie in one tensor."""

from genfound.layouts.base import Layout
from genfound.layouts.dense import Dense
from genfound.layouts.packed import Packed
from genfound.layouts.padded import Padded

__all__ = ["Dense", "Layout", "Packed", "Padded"]
