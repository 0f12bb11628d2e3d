"""Graph passes, one file or folder each, and the model properties that they require, ensure and invalidate."""

from __future__ import annotations

_SHARED_MODULES = (
    "attention_fusion",
    "kv",
    "kv_cache_dtypes",
    "legalize_msft",
    "opset",
    "position_subgraph",
    "product_inputs",
    "properties",
    "residual_stream",
    "symbolic_shapes",
    "to_fp32",
    "weight_sites",
)


def members() -> dict[str, str]:
    """Return a mapping from pass name to module; a pass in `kv/` has the prefix `kv-`, as in `kv-evict`."""
    from ryzen_compile.registry import modules_of
    from ryzen_passes import kv

    return {**modules_of(__name__, exclude=_SHARED_MODULES), **kv.members()}
