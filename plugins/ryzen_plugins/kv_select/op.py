"""Declaration of the op KVSelect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ryzen_compile.spec.op import AttributeParam, KernelSpec, TensorParam
from ryzen_plugins._cache_declarations import SCORE
from ryzen_plugins._declaration import RyzenOp, dims_table


def _make_inputs(random: np.random.Generator, dims: Mapping[str, int], attributes: Mapping[str, float]) -> dict[str, Any]:
    """Return a full or partially filled cache, in time order or shuffled, with coarse scores so that ties occur."""
    b, h, c = (dims[name] for name in "BHC")
    position = np.full((b, h, c), -1, np.int32)
    for sequence in range(b):
        filled = c if random.random() < 0.6 else int(random.integers(0, c + 1))
        tokens = filled + int(random.integers(0, 2 * c + 1))
        ordered = random.random() < 0.5
        for head in range(h):
            positions = np.sort(random.permutation(tokens)[:filled])
            position[sequence, head, :filled] = positions if ordered else random.permutation(positions)
            if not ordered:  # free slots may lie between filled ones
                position[sequence, head] = random.permutation(position[sequence, head])
    return {"score": np.round(random.normal(size=(b, h, c)) * 2) / 2, "position": position}


KV_SELECT = RyzenOp(
    name="KVSelect",
    description="select the `keep` highest-scoring slots of a cache, in time order, for compaction",
    formula="""
        filled    = the slots of position >= 0
        newest    = max position[b, h]
        protected = the filled slots of position < sinks or position > newest - recent
        selected  = the first `keep` filled slots (all of them if there are fewer), ordered by: protected first, then descending
                    score, then ascending slot. +inf counts as the largest finite number, -inf and NaN as the lowest
        index     = the selected slots by ascending position (ties by ascending slot), padded with -1
        length    = the number of selected slots in the first head of the sequence, and in all heads if they hold equally many
    """,
    inputs=(
        SCORE,
        TensorParam("position", "int32", "B H C", "token position of each slot, below 2**31 - 1; negative if the slot is free"),
    ),
    outputs=(
        TensorParam("index", "int32", "B H keep", "the slots to keep, in time order, padded with -1"),
        TensorParam("length", "int64", "B", "number of selected slots: the key/value length of the compacted cache"),
    ),
    attributes=(
        AttributeParam("keep", int, 1, 32768, "number of slots to keep"),
        AttributeParam("sinks", int, 0, 32768, "number of tokens at the start of the sequence that are always kept"),
        AttributeParam("recent", int, 0, 32768, "number of most recent tokens that are always kept"),
    ),
    type_constraints={},
    reference="ryzen_plugins.kv_select.reference:KVSelect",
    dim_limits={"B": (1, 65535), "H": (1, 65535), "C": (1, 32768)},
    constraints=("keep <= C", "sinks + recent <= keep"),
    tolerance={"float32": 0.0},
    kernel=KernelSpec(
        source="ryzen_plugins.kv_select.kernel:kv_select",
        scalars={"heads": "H", "slots": "C"},
        constants={
            "KEEP": "keep",
            "SINKS": "sinks",
            "RECENT": "recent",
            "BLOCK_C": "power_of_two(C)",
            "BLOCK_M": "power_of_two(keep)",
        },
        grid=("B * H",),
        tactics=({"num_warps": 4}, {"num_warps": 8}, {"num_warps": 16}),
    ),
    bytes_moved="B * H * (8 * C + 4 * keep)",
    typical_dims={"B": 1, "H": 8, "C": 8192, "keep": 2048, "sinks": 4, "recent": 64},
    test_cases=dims_table("B H C keep sinks recent", (3, 2, 13, 7, 2, 3), (2, 3, 70, 33, 0, 0), (1, 1, 1, 1, 1, 0)),
    make_inputs=_make_inputs,
)
