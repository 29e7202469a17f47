"""One training step of any model, simulated on `meta`."""
