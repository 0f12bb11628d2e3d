"""Declarations of the ops KVCompact and KVCompactRotary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ryzen_compile.spec.op import FLOATS, AttributeParam, KernelSpec, Op, TensorParam


def _make_inputs(random: np.random.Generator, dims: Mapping[str, int], attributes: Mapping[str, float]) -> dict[str, Any]:
    """Return a cache and the slots to keep: in time order and padded with -1, or random, with some out of range or free."""
    b, h, c, m = (dims[name] for name in "BHCM")
    position = np.full((b, h, c), -1, np.int32)
    index = np.full((b, h, m), -1, np.int32)
    for sequence, head in np.ndindex(b, h):
        filled = c if random.random() < 0.5 else int(random.integers(0, c + 1))
        position[sequence, head, :filled] = np.sort(random.integers(0, 2**21, filled))
        kept = min(m, filled)
        index[sequence, head, :kept] = np.sort(random.permutation(filled)[:kept])
        if random.random() < 0.3:
            index[sequence, head] = random.integers(-2, c + 2, m)
    return {
        "k": random.normal(size=(b, h, c, dims["D"])),
        "v": random.normal(size=(b, h, c, dims["E"])),
        "score": random.normal(size=(b, h, c)),
        "position": position,
        "index": index,
    }


def _make_rotary_inputs(
    random: np.random.Generator, dims: Mapping[str, int], attributes: Mapping[str, float]
) -> dict[str, Any]:
    """Return the inputs of KVCompact, and RoPE frequencies for a random base."""
    base = 10.0 ** random.uniform(2, 7)
    return {
        **_make_inputs(random, dims, attributes),
        "frequency": base ** (-np.arange(dims["F"]) / dims["F"]),
    }


_INPUTS = (
    TensorParam("k", "T", "B H C D", "keys, C slots per head"),
    TensorParam("v", "T", "B H C E", "values"),
    TensorParam("score", "float32", "B H C", "retention score of each slot"),
    TensorParam("position", "int32", "B H C", "token position of each slot; negative if the slot is free"),
    TensorParam("index", "int32", "B H M", "the slots to keep, in output order; -1 for an empty row"),
)
_OUTPUTS = (
    TensorParam("k_out", "T", "B H M D", "keys of the kept slots"),
    TensorParam("v_out", "T", "B H M E", "values of the kept slots"),
    TensorParam("score_out", "float32", "B H M", "scores of the kept slots; 0 for an empty row"),
    TensorParam("position_out", "int32", "B H M", "positions of the kept slots; -1 for an empty row"),
)
_DIM_LIMITS = {"B": (1, 65535), "H": (1, 65535), "C": (1, 1 << 20), "M": (1, 65535), "D": (1, 1024), "E": (1, 1024)}
_BYTES_MOVED = "B * H * M * (2 * (D + E) * size_T + 20)"
_CONSTANTS = {
    "D": "D",
    "E": "E",
    "BLOCK_E": "power_of_two(E)",
    "ROWS": "min(power_of_two(M), max(1, TILE_BYTES // (power_of_two(max(D, E)) * size_T)))",
}
_TACTICS = (
    {"TILE_BYTES": 4096, "num_warps": 4},
    {"TILE_BYTES": 8192, "num_warps": 4},
    {"TILE_BYTES": 16384, "num_warps": 8},
)
_TYPICAL_DIMS = {"B": 1, "H": 8, "C": 8192, "M": 2048, "D": 128, "E": 128}

KV_COMPACT = Op(
    domain="ryzen",
    name="KVCompact",
    version=1,
    description="compact a key/value cache to the kept slots",
    formula="""
        i      = index[b, h, m]
        filled = 0 <= i < C and position[b, h, i] >= 0
        k_out, v_out, score_out, position_out [b, h, m] = those of slot i if filled; otherwise zeros, 0 and -1
    """,
    inputs=_INPUTS,
    outputs=_OUTPUTS,
    type_constraints={"T": (*FLOATS, "int8")},
    reference="ryzen_plugins.kv_compact.reference:KVCompact",
    dim_limits=_DIM_LIMITS,
    tolerance=dict.fromkeys((*FLOATS, "int8"), 0.0),
    kernel=KernelSpec(
        source="ryzen_plugins.kv_compact.kernel:kv_compact",
        scalars={"slots": "C", "kept": "M"},
        constants={**_CONSTANTS, "BLOCK_D": "power_of_two(D)"},
        static_dims=frozenset("DE"),
        grid=("B * H", "ceil_div(M, ROWS)"),
        tactics=_TACTICS,
    ),
    bytes_moved=_BYTES_MOVED,
    typical_dims=_TYPICAL_DIMS,
    test_cases=(
        {"B": 2, "H": 3, "C": 9, "M": 5, "D": 8, "E": 5},
        {"B": 1, "H": 2, "C": 60, "M": 70, "D": 33, "E": 64},
        {"B": 1, "H": 1, "C": 1, "M": 1, "D": 1, "E": 1},
    ),
    make_inputs=_make_inputs,
)

KV_COMPACT_ROTARY = Op(
    domain="ryzen",
    name="KVCompactRotary",
    version=1,
    description="compact a key/value cache to the kept slots, with keys rotated to the positions 0, 1, 2, ...",
    formula="""
        i      = index[b, h, m]
        filled = 0 <= i < C and position[b, h, i] >= 0
        angle  = (m - position[b, h, i]) * frequency[f]      a frequency outside of (-32, 32), or NaN, counts as 0
        pair   = (f, f + F) of a key; (2 f, 2 f + 1) if interleaved
        k_out  = for each pair x, y of slot i: x cos(angle) - y sin(angle), y cos(angle) + x sin(angle); the other D - 2 F
                 elements are unchanged. If one element of a pair is not finite, both elements are not finite in the result
        v_out, score_out = those of slot i; position_out = m
        if not filled: zeros, 0 and -1
    """,
    inputs=(*_INPUTS, TensorParam("frequency", "float32", "F", "radians per position of each rotated pair")),
    outputs=(
        TensorParam("k_out", "T", "B H M D", "keys of the kept slots, rotated to their new positions"),
        *_OUTPUTS[1:3],
        TensorParam("position_out", "int32", "B H M", "the new positions m; -1 for an empty row"),
    ),
    attributes=(
        AttributeParam("interleaved", int, 0, 1, "1 if the two elements of a pair are adjacent, 0 if they are F apart"),
    ),
    type_constraints={"T": FLOATS},
    reference="ryzen_plugins.kv_compact.reference:KVCompactRotary",
    dim_limits={**_DIM_LIMITS, "F": (1, 512)},
    constraints=("2 * F <= D",),
    tolerance={"float32": 4e-6, "float16": 6e-4, "bfloat16": 8e-3},
    kernel=KernelSpec(
        source="ryzen_plugins.kv_compact.kernel:kv_compact_rotary",
        scalars={"slots": "C", "kept": "M"},
        constants={
            **_CONSTANTS,
            "F": "F",
            "INTERLEAVED": "interleaved",
            "BLOCK_F": "power_of_two(F)",
            "BLOCK_REST": "power_of_two(D - 2 * F)",
        },
        static_dims=frozenset("DEF"),
        grid=("B * H", "ceil_div(M, ROWS)"),
        tactics=_TACTICS,
    ),
    bytes_moved=_BYTES_MOVED,
    typical_dims={**_TYPICAL_DIMS, "F": 64, "interleaved": 0},
    test_cases=(
        {"B": 2, "H": 3, "C": 9, "M": 5, "D": 8, "E": 5, "F": 4, "interleaved": 0},
        {"B": 1, "H": 2, "C": 60, "M": 70, "D": 33, "E": 64, "F": 11, "interleaved": 1},
        {"B": 1, "H": 1, "C": 1, "M": 1, "D": 2, "E": 1, "F": 1, "interleaved": 0},
    ),
    make_inputs=_make_rotary_inputs,
)
