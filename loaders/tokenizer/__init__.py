"""The tokenizer, made ready for training."""
