"""Passes over the KV caches of a decoder.

`recognition` finds the attention layers, their caches and their positions. `static` turns growing caches into states of fixed
size, and `ring_buffer` gives layers with an attention window a ring of that window; `evict`, `window`, `compact`, `select` and
`quant` each apply one KV method to these states. `scorers` holds the scores by which tokens are evicted.
"""

from __future__ import annotations

from pathlib import Path

SCORES_GROUP = "kv_scores"
"""The registry group of scores; its entry point group is `ryzen_compile.kv_scores`."""


def members() -> dict[str, str]:
    """Return a mapping from pass name to module: the folders with a `rewrite.py`, with the prefix `kv-`."""
    folders = sorted(path.parent.name for path in Path(__file__).parent.glob("*/rewrite.py"))
    return {f"kv-{name.replace('_', '-')}": f"{__name__}.{name}" for name in folders}
