"""Write the caches of kv-window: ring buffers with sinks, in every layer that needs one."""

from __future__ import annotations

from collections.abc import Mapping

from ryzen_compile.ir.edit.builder import ModelInfo
from ryzen_compile.spec.passes import Change
from ryzen_passes.kv.recognition.rotation import Rotation
from ryzen_passes.kv.ring_buffer import to_ring_buffers
from ryzen_passes.kv.static.cache_view import StaticCacheView


def keep_window(
    view: StaticCacheView, model_info: ModelInfo, rotations: Mapping[int, Rotation], *, sinks: int, window: int
) -> Change:
    """Rewrite `view` in place so that every head keeps the first `sinks` and the latest `window` tokens.

    `rotations` are the key rotations by the index of each layer to rewrite; a RoPE table limits the length of a sequence.
    """
    tables = (view.spec.max_positions, *(rotation.max_positions for rotation in rotations.values()))
    capacity = min((length for length in tables if length is not None), default=None)
    return to_ring_buffers(
        view,
        model_info,
        [*rotations],
        window=window,
        sinks=sinks,
        rotations=[*rotations.values()],
        capacity=capacity,
    )
