"""KVSelect: the slots of a key/value cache that are worth most, in time order."""

from ryzen_plugins.kv_select.op import KV_SELECT

__all__ = ["KV_SELECT"]
