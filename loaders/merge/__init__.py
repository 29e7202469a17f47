"""A trained adapter merged into its base while that is read, as PEFT merges it."""
