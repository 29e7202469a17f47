"""The model without its weights."""
