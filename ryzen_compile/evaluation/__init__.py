"""Evaluate: what a decoder with caches of fixed size costs in text, tasks and long generation, against its PyTorch baseline."""
