"""Evaluation of a tokenizer on pictures, and a summary of its size and FLOPs before training."""
