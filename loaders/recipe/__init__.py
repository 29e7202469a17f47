"""The file with which a trainer takes a prepared directory."""
