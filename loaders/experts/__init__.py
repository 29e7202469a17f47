"""Experts in 4 bits, as they are loaded: one layer an expert, made from slices of what is stored for all of them."""
