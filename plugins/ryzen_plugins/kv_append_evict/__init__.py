"""KVAppendEvict: appends a decode step or a prefill chunk to a key/value cache of fixed capacity."""

from ryzen_plugins.kv_append_evict.op import KV_APPEND_EVICT

__all__ = ["KV_APPEND_EVICT"]
