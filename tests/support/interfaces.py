"""Sample interfaces: an encoder with a mask, and a decoder with a growing cache."""

from __future__ import annotations

from ryzen_compile.spec.interface import InputSpec, Interface, StateSpec, TensorSpec

ENCODER = Interface(
    inputs=(
        InputSpec(name="input_ids", dtype="int64", dims=("batch", "seq"), role="ids", low=0, high=99),
        InputSpec(name="attention_mask", dtype="int64", dims=("batch", "seq"), role="mask", padding_value=0),
    ),
    outputs=(TensorSpec(name="hidden", dtype="float32", dims=("batch", "seq", 8)),),
    batch="batch",
)

DECODER = Interface(
    inputs=(
        InputSpec(name="input_ids", dtype="int64", dims=("batch", "seq"), role="ids", low=0, high=99),
        InputSpec(name="attention_mask", dtype="int64", dims=("batch", "past+seq"), role="mask", padding_value=0),
        InputSpec(name="position_ids", dtype="int64", dims=("batch", "seq"), role="positions", low=0, high=63),
        InputSpec(name="key", dtype="float32", dims=("batch", 2, "past", 4), role="state"),
    ),
    outputs=(TensorSpec(name="present", dtype="float32", dims=("batch", 2, "past+seq", 4)),),
    states=(StateSpec(name="key", input="key", output="present", append_axis=2),),
    batch="batch",
)


def encoder_shapes(batch: int, seq: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the inputs of ENCODER."""
    return {"input_ids": (batch, seq), "attention_mask": (batch, seq)}


def decoder_shapes(batch: int, seq: int, past: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the inputs of DECODER."""
    return {
        "input_ids": (batch, seq),
        "attention_mask": (batch, past + seq),
        "position_ids": (batch, seq),
        "key": (batch, 2, past, 4),
    }
