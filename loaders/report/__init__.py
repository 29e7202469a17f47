"""What was done, written down and read again."""
