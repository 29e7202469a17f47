"""How checkpoints store weights: one file a format."""
