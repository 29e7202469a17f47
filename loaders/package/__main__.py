"""`python -m ftload`."""

from ftload.cli.app import main  # pyright: ignore[reportMissingImports]

main()
