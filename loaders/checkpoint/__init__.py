"""What the headers of a checkpoint say."""
