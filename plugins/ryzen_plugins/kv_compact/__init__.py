"""KVCompact and KVCompactRotary: a key/value cache moved together, its keys left as they are or rotated to new positions."""

from ryzen_plugins.kv_compact.op import KV_COMPACT, KV_COMPACT_ROTARY

__all__ = ["KV_COMPACT", "KV_COMPACT_ROTARY"]
