"""Representation alignment: a block of the backbone learns to say what a frozen vision encoder sees in the image."""

from genfound.alignment.base import Teacher, TeacherFeatures, spatially_normalised
from genfound.alignment.repa import Alignment

__all__ = ["Alignment", "Teacher", "TeacherFeatures", "spatially_normalised"]
