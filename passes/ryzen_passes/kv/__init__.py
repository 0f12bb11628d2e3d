"""Passes over the KV caches of a decoder.

`recognition` finds the attention layers, their caches and their positions. `static` turns growing caches into states of fixed
size; `evict`, `window`, `compact`, `select` and `quant` each apply one cache method to these states. `scorers` holds the scores
by which tokens are evicted.
"""
