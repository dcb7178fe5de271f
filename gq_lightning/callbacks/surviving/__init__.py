"""Callbacks for checkpoints, exact resuming, signals and lost ranks."""
