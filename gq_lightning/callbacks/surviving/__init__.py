"""Callbacks that save: checkpoints, resuming to the bit, signals, lost ranks."""
