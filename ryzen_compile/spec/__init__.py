"""Declarations: interface, KV cache, target, profile, element types, properties, passes, ops, recipes. Light to import."""
