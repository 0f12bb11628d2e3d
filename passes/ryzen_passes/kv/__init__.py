"""The caches of a decoder: how they are found, and how they are rewritten."""
