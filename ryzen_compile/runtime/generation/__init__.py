"""Autoregressive generation with fixed-size KV caches: decoding sessions, step graphs and sampling."""
