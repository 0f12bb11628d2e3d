"""KVCompact and KVCompactRotary: compact a key/value cache, with keys unchanged or rotated to their new positions."""

from ryzen_plugins.kv_compact.op import KV_COMPACT, KV_COMPACT_ROTARY

__all__ = ["KV_COMPACT", "KV_COMPACT_ROTARY"]
