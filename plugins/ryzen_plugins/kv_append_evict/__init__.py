"""KVAppendEvict: a decode or chunk step of a key/value cache of fixed capacity."""

from ryzen_plugins.kv_append_evict.op import KV_APPEND_EVICT

__all__ = ["KV_APPEND_EVICT"]
