"""Where a model comes from, and its bytes."""
