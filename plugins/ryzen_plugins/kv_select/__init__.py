"""KVSelect: selects the highest-scoring slots of a key/value cache, in time order."""

from ryzen_plugins.kv_select.op import KV_SELECT

__all__ = ["KV_SELECT"]
