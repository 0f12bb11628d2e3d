"""Utilities: records with a JSON form, atomic file writes, file hashing, locks, user scripts and the processor's name."""
