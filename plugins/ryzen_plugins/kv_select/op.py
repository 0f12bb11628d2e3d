"""The declaration of KVSelect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ryzen_compile.spec.op import AttributeParam, KernelSpec, Op, TensorParam


def _make_inputs(random: np.random.Generator, dims: Mapping[str, int], attributes: Mapping[str, float]) -> dict[str, Any]:
    """Return a cache, full or not, in time order or not; scores are coarse, so that they tie."""
    b, h, c = (dims[name] for name in "BHC")
    position = np.full((b, h, c), -1, np.int32)
    for sequence in range(b):
        held = c if random.random() < 0.6 else int(random.integers(0, c + 1))
        seen = held + int(random.integers(0, 2 * c + 1))
        ordered = random.random() < 0.5
        for head in range(h):
            at = np.sort(random.permutation(seen)[:held])
            position[sequence, head, :held] = at if ordered else random.permutation(at)
            if not ordered:  # free slots may lie between the others
                position[sequence, head] = random.permutation(position[sequence, head])
    return {"score": np.round(random.normal(size=(b, h, c)) * 2) / 2, "position": position}


KV_SELECT = Op(
    domain="ryzen",
    name="KVSelect",
    version=1,
    description="name the `keep` slots of a cache that are worth most, in time order: what a cache is compacted to",
    formula="""
        filled    = the slots of position >= 0
        newest    = max position[b, h]
        protected = the filled slots of position < sinks or position > newest - recent
        chosen    = the `keep` first of the filled slots, or all of them if they are fewer: the protected ones first, then by
                    score, highest first; of equals the lowest slot first. +inf counts as the largest finite number, -inf and
                    NaN count as the lowest
        index     = the chosen slots by position, lowest first (of equals the lowest slot first), then -1
        length    = how many slots are chosen in the first head of the sequence, and in all where all hold equally many
    """,
    inputs=(
        TensorParam("score", "float32", "B H C", "how much each slot is worth keeping"),
        TensorParam("position", "int32", "B H C", "the token that each slot holds, below 2**31 - 1; negative where it is free"),
    ),
    outputs=(
        TensorParam("index", "int32", "B H keep", "the slots to keep, in time order; -1 behind the last"),
        TensorParam("length", "int64", "B", "how many there are: the key/value length of the compacted cache"),
    ),
    attributes=(
        AttributeParam("keep", int, 1, 32768, "how many slots are kept"),
        AttributeParam("sinks", int, 0, 32768, "how many of the first tokens are always kept"),
        AttributeParam("recent", int, 0, 32768, "how many of the latest tokens are always kept"),
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
    test_cases=(
        {"B": 3, "H": 2, "C": 13, "keep": 7, "sinks": 2, "recent": 3},
        {"B": 2, "H": 3, "C": 70, "keep": 33, "sinks": 0, "recent": 0},
        {"B": 1, "H": 1, "C": 1, "keep": 1, "sinks": 1, "recent": 0},
    ),
    make_inputs=_make_inputs,
)
