"""Images to latents, once, into a store."""
