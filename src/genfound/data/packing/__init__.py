"""The order of images, packs, global steps and batches."""
