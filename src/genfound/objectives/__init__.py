"""Objectives: what a network is trained to predict, and what its output means to a sampler."""
