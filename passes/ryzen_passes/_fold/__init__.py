"""How `fold` works: what is known of each value, and what follows from it."""
