"""Graph passes: one file or folder each, and the properties that they declare."""

from __future__ import annotations

_KV_SUPPORT = ("query_aware_cache", "recognition", "scorers", "state_editor", "transaction")


def members() -> dict[str, str]:
    """Return the passes of this package by name: `fold`, ..., and those of `kv/` as `kv-evict`, ..."""
    from ryzen_compile.registry import modules_of

    kv = modules_of(f"{__name__}.kv", exclude=_KV_SUPPORT)
    return {
        **modules_of(__name__, exclude=("kv", "legalize_msft", "opset", "properties")),
        **{f"kv-{name}": module for name, module in kv.items()},
    }
