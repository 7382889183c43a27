"""Callbacks: what happens beside the training step."""
