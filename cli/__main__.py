"""`python -m ftload.cli`."""

from .app import main

main()
