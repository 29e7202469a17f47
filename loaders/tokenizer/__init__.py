"""The tokenizer, set up for training."""
