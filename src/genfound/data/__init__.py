"""Data: where images come from, in which order, and how they are grouped into batches."""
