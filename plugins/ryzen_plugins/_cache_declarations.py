"""Parameters and tactics shared by the ops on key/value caches."""

from __future__ import annotations

from ryzen_compile.spec.op import TensorParam

SCORE = TensorParam("score", "float32", "B H C", "retention score of each slot")
SLOTS = (TensorParam("k", "T", "B H C D", "keys, C slots per head"), TensorParam("v", "T", "B H C E", "values"), SCORE)
"""The contents of the slots of a cache, without their positions."""
TILE_TACTICS = (
    {"TILE_BYTES": 4096, "num_warps": 4},
    {"TILE_BYTES": 8192, "num_warps": 4},
    {"TILE_BYTES": 16384, "num_warps": 8},
)
"""Bytes of a tile of whole rows or pages, and warps of a program."""
