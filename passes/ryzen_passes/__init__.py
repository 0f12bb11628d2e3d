"""Graph passes, one file or folder each, and the model properties that they require, ensure and invalidate."""

from __future__ import annotations

_KV_SUPPORT = (
    "cache_rewriter",
    "query_aware_cache",
    "recognition",
    "scorers",
    "slot_writes",
    "state_editor",
)


def members() -> dict[str, str]:
    """Return a mapping from pass name to module; a pass in `kv/` has the prefix `kv-`, as in `kv-evict`."""
    from ryzen_compile.registry import modules_of

    kv = modules_of(f"{__name__}.kv", exclude=_KV_SUPPORT)
    return {
        **modules_of(__name__, exclude=("kv", "legalize_msft", "opset", "properties")),
        **{f"kv-{name}": module for name, module in kv.items()},
    }
