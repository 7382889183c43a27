"""Layers that are bit-identical in every backbone that uses them."""
