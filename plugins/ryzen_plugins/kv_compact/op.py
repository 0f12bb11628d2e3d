"""Declarations of the ops KVCompact and KVCompactRotary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ryzen_compile.spec.op import FLOATS, AttributeParam, InputFactory, KernelSpec, Op, TensorParam
from ryzen_plugins._cache_declarations import SLOTS, TILE_TACTICS
from ryzen_plugins._declaration import RyzenOp


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


_SLOT = """
        i      = index[b, h, m]
        filled = 0 <= i < C and position[b, h, i] >= 0"""
_INPUTS = (
    *SLOTS,
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
_CONSTANTS = {
    "D": "D",
    "E": "E",
    "BLOCK_E": "power_of_two(E)",
    "ROWS": "min(power_of_two(M), max(1, TILE_BYTES // (power_of_two(max(D, E)) * size_T)))",
}


def _compact_op(
    name: str,
    *,
    description: str,
    formula: str,
    inputs: tuple[TensorParam, ...],
    outputs: tuple[TensorParam, ...],
    attributes: tuple[AttributeParam, ...] = (),
    tolerance: Mapping[str, float],
    kernel: str,
    constants: Mapping[str, str],
    more_limits: Mapping[str, tuple[int, int]],
    constraints: tuple[str, ...] = (),
    more_dims: tuple[Mapping[str, int], ...],
    make_inputs: InputFactory,
) -> Op:
    """Return an op that compacts a cache; `kernel` is the name of its kernel function.

    The element types of the cache are those of `tolerance`. `more_dims` are further dims and attributes: typical ones, and
    those of three test cases.
    """
    typical = {"B": 1, "H": 8, "C": 8192, "M": 2048, "D": 128, "E": 128}
    test_cases = (
        {"B": 2, "H": 3, "C": 9, "M": 5, "D": 8, "E": 5},
        {"B": 1, "H": 2, "C": 60, "M": 70, "D": 33, "E": 64},
        {"B": 1, "H": 1, "C": 1, "M": 1, "D": 1, "E": 1},
    )
    return RyzenOp(
        name=name,
        description=description,
        formula=_SLOT + formula,
        inputs=inputs,
        outputs=outputs,
        attributes=attributes,
        type_constraints={"T": tuple(tolerance)},
        reference=f"ryzen_plugins.kv_compact.reference:{name}",
        dim_limits={**_DIM_LIMITS, **more_limits},
        constraints=constraints,
        tolerance=tolerance,
        kernel=KernelSpec(
            source=f"ryzen_plugins.kv_compact.kernel:{kernel}",
            scalars={"slots": "C", "kept": "M"},
            constants={**_CONSTANTS, **constants},
            static_dims=frozenset({"D", "E", *more_limits}),
            grid=("B * H", "ceil_div(M, ROWS)"),
            tactics=TILE_TACTICS,
        ),
        bytes_moved="B * H * M * (2 * (D + E) * size_T + 20)",
        typical_dims={**typical, **more_dims[0]},
        test_cases=tuple({**case, **more} for case, more in zip(test_cases, more_dims[1:], strict=True)),
        make_inputs=make_inputs,
    )


KV_COMPACT = _compact_op(
    "KVCompact",
    description="compact a key/value cache to the kept slots",
    formula="""
        k_out, v_out, score_out, position_out [b, h, m] = those of slot i if filled; otherwise zeros, 0 and -1
    """,
    inputs=_INPUTS,
    outputs=_OUTPUTS,
    tolerance=dict.fromkeys((*FLOATS, "int8"), 0.0),
    kernel="kv_compact",
    constants={"BLOCK_D": "power_of_two(D)"},
    more_limits={},
    more_dims=({}, {}, {}, {}),
    make_inputs=_make_inputs,
)

KV_COMPACT_ROTARY = _compact_op(
    "KVCompactRotary",
    description="compact a key/value cache to the kept slots, with keys rotated to the positions 0, 1, 2, ...",
    formula="""
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
    tolerance={"float32": 4e-6, "float16": 6e-4, "bfloat16": 8e-3},
    kernel="kv_compact_rotary",
    constants={
        "F": "F",
        "INTERLEAVED": "interleaved",
        "BLOCK_F": "power_of_two(F)",
        "BLOCK_REST": "power_of_two(D - 2 * F)",
    },
    more_limits={"F": (1, 512)},
    constraints=("2 * F <= D",),
    more_dims=(
        {"F": 64, "interleaved": 0},
        {"F": 4, "interleaved": 0},
        {"F": 11, "interleaved": 1},
        {"D": 2, "F": 1, "interleaved": 0},
    ),
    make_inputs=_make_rotary_inputs,
)
