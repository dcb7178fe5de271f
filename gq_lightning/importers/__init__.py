"""Import of checkpoints of other code."""
