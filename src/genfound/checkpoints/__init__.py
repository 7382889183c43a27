"""Weights in files: read, recognised, converted and started from."""
