"""Names and shapes of the released checkpoints, a file for each family."""
