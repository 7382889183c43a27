"""Sets of images, from files or drawn."""
