"""Autoregressive generation with KV caches of fixed size: sessions, step graphs, sampling."""
