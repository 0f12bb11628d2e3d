"""Tactics shared by the kernels that read tiles of whole cache rows or pages."""

from __future__ import annotations

TILE_TACTICS = (
    {"TILE_BYTES": 4096, "num_warps": 4},
    {"TILE_BYTES": 8192, "num_warps": 4},
    {"TILE_BYTES": 16384, "num_warps": 8},
)
"""Bytes of a tile, and warps of a program."""
