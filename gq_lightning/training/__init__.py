"""Training an ImageTokenizer with Lightning."""
