"""Which layers an adapter trains, and what it is made of."""
