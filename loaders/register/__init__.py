"""`import ftload.register`: after it, transformers loads prepared directories whose experts are 4-bit."""

# by the name that it is installed under: this package stands beside ftload.loaders then
from ftload.loaders.experts.registration import register_experts  # pyright: ignore[reportMissingImports]

register_experts()
