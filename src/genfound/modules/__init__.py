"""LightningModules: one training step of any backbone, and what only a family needs."""
