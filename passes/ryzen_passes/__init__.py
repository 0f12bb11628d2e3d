"""Graph passes: one file or folder each, and the properties that they declare."""

from __future__ import annotations

_KV_SUPPORT = ("recognition", "scorers", "states", "torch_caches", "transaction")


def members() -> dict[str, str]:
    """Return the passes of this package by name: `fold`, ..., and those of `kv/` as `kv-evict`, ..."""
    from ryzen_compile.registry import modules_of

    kv = modules_of(f"{__name__}.kv", besides=_KV_SUPPORT)
    return {
        **modules_of(__name__, besides=("kv", "legalize_msft", "opset", "properties")),
        **{f"kv-{name}": module for name, module in kv.items()},
    }
