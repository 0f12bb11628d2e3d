"""Declaration of the op KVAppendEvict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ryzen_compile.spec.op import FLOATS, AttributeParam, KernelSpec, TensorParam
from ryzen_plugins._cache_declarations import SLOTS
from ryzen_plugins._declaration import RyzenOp, dims_table


def _make_inputs(random: np.random.Generator, dims: Mapping[str, int], attributes: Mapping[str, float]) -> dict[str, Any]:
    """Return a cache after a random number of tokens, and the next step, with coarse scores so that ties occur."""
    b, h, c, s = (dims[name] for name in "BHCS")
    position = np.full((b, h, c), -1, np.int32)
    new_position = np.full((b, s), -1, np.int32)
    for sequence in range(b):
        tokens = int(random.integers(0, 3 * c + 1))
        filled = min(tokens, c)
        for head in range(h):
            position[sequence, head, :filled] = random.permutation(random.permutation(tokens)[:filled])
        new_tokens = s if random.random() < 0.7 else int(random.integers(0, s + 1))
        new_position[sequence, :new_tokens] = tokens + np.arange(new_tokens)
    return {
        "k": random.normal(size=(b, h, c, dims["D"])),
        "v": random.normal(size=(b, h, c, dims["E"])),
        "score": np.round(random.normal(size=(b, h, c)) * 2) / 2,
        "position": position,
        "new_k": random.normal(size=(b, h, s, dims["D"])),
        "new_v": random.normal(size=(b, h, s, dims["E"])),
        "new_score": np.round(random.normal(size=(b, h, s)) * 2) / 2,
        "new_position": new_position,
    }


KV_APPEND_EVICT = RyzenOp(
    name="KVAppendEvict",
    description="append keys and values to a cache of fixed capacity; a full cache evicts the slots of lowest score",
    formula="""
        now      = max new_position[b]                     new tokens of position < 0 are padding and are skipped
        unseen   = the tokens with position <= now - window, sinks included; none if window = 0
        free     = the slots of position < 0, and those of unseen tokens; new unseen tokens are skipped
        surplus  = number of cached tokens that are not unseen + number of new tokens that are not skipped - C
        evicted  = the `surplus` lowest by (score, slot), cached tokens before new ones, among the other tokens with
                   sinks <= position <= now - recent; NaN is lowest, +inf counts as the largest finite number
        slot     = for the j-th new token that is not skipped or evicted: the j-th lowest slot that is free or evicted;
                   otherwise -1
        k[slot], v[slot], score[slot], position[slot] = those of the new token
        length   = number of cached tokens afterwards that are not unseen
    """,
    inputs=(
        *SLOTS,
        TensorParam("position", "int32", "B H C", "token position of each slot; -1 if the slot is free"),
        TensorParam("new_k", "T", "B H S D", "keys of this step, in time order"),
        TensorParam("new_v", "T", "B H S E", "values of this step"),
        TensorParam(
            "new_score", "float32", "B H S", "scores of this step; pass the positions to evict the oldest tokens first"
        ),
        TensorParam("new_position", "int32", "B S", "positions of this step; -1 for padding"),
    ),
    outputs=(
        TensorParam("k_out", "T", "B H C D", aliases_input="k"),
        TensorParam("v_out", "T", "B H C E", aliases_input="v"),
        TensorParam("score_out", "float32", "B H C", aliases_input="score"),
        TensorParam("position_out", "int32", "B H C", aliases_input="position"),
        TensorParam("length", "int64", "B", "number of cached tokens; without a window the key/value length for attention"),
        TensorParam(
            "slot", "int32", "B H S", "the slot of each new token, or -1; the position at which to write other per-slot data"
        ),
    ),
    attributes=(
        AttributeParam("sinks", int, 0, 65536, "number of tokens at the start of the sequence that are never evicted"),
        AttributeParam("recent", int, 1, 65536, "number of most recent tokens, including the newest, that are never evicted"),
        AttributeParam(
            "window", int, 0, 2**30, "attention window: number of latest tokens that later steps attend to; 0: unlimited"
        ),
    ),
    type_constraints={"T": (*FLOATS, "int8")},
    reference="ryzen_plugins.kv_append_evict.reference:KVAppendEvict",
    dim_limits={"B": (1, 65535), "H": (1, 65535), "C": (1, 32768), "S": (1, 3840), "D": (1, 1024), "E": (1, 1024)},
    constraints=("sinks + recent <= C",),
    tolerance=dict.fromkeys((*FLOATS, "int8"), 0.0),
    kernel=KernelSpec(
        source="ryzen_plugins.kv_append_evict.kernel:kv_append_evict",
        scalars={"heads": "H", "slots": "C", "chunk": "S"},
        constants={
            "D": "D",
            "E": "E",
            "SINKS": "sinks",
            "RECENT": "recent",
            "WINDOW": "window",
            "BLOCK_C": "power_of_two(C)",
            "BLOCK_S": "power_of_two(S)",
            "BLOCK_D": "power_of_two(max(D, E))",
        },
        static_dims=frozenset("DE"),
        grid=("B * H",),
        tactics=({"num_warps": 4}, {"num_warps": 8}),
    ),
    bytes_moved="B * H * (8 * C + 2 * S * ((D + E) * size_T + 8) + 4 * S)",
    typical_dims={"B": 1, "H": 8, "C": 4096, "S": 1, "D": 128, "E": 128, "sinks": 4, "recent": 64, "window": 0},
    test_cases=dims_table(
        "B H C S D E sinks recent window",
        (2, 3, 9, 1, 8, 5, 2, 3, 0),
        (3, 2, 7, 4, 3, 8, 1, 2, 0),
        (1, 1, 1, 1, 1, 1, 0, 1, 0),
        (2, 2, 9, 1, 4, 4, 2, 3, 7),
        (2, 2, 9, 6, 4, 4, 2, 3, 4),
    ),
    make_inputs=_make_inputs,
)
