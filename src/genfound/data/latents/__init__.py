"""Sets of latents: stores written by genfound, and those that others have published."""
