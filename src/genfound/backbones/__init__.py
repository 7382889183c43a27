"""Backbones: one architecture, readable in one file each."""
