"""Folders of diffusers, in and out: its own DiT, and networks of ours with their code as files beside the weights."""
