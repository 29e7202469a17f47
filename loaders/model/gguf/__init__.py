"""GGUF files as checkpoints, by what transformers makes of them."""
