"""How checkpoints store weights: `interface.py` says what a format answers, one file a format answers it."""
