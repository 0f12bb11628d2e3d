"""Edits of a graph: insert, replace, remove, and run a rewrite as a transaction."""
