"""Evaluation: measure what a decoder with static caches loses in text, tasks and long generation, against PyTorch."""
