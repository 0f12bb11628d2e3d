"""Persistent artifacts: engine packages and the build cache."""
