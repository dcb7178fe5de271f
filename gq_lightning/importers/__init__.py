"""Checkpoints of other code as tokenizers of this package."""
