"""How output tensors are made, one step at a time."""
