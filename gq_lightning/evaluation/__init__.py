"""What a tokenizer gives and costs: its metrics on pictures, and its size and FLOPs before it is trained."""
