"""`ftload inspect`: what headers tell of a checkpoint."""
