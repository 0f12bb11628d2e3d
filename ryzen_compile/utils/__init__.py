"""Utilities: records with a JSON form, atomic file writes, file hashing, inter-process locks and user scripts."""
