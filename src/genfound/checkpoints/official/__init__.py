"""Shapes and options of the released checkpoints, a file for each family."""
