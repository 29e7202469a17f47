"""The machine, its libraries and its files: no topic of ftload's own."""
