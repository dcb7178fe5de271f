"""Training an ImageTokenizer under Lightning."""
