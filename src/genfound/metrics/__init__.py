"""Metrics: from uint8 images to figures that carry their protocol."""
