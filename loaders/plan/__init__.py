"""Everything decided, nothing done."""
