"""Comparison: how far an engine is from its baseline, over the shapes it will meet."""
