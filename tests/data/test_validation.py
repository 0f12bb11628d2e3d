"""Tests of the validation of inputs against an interface, and of dimensions that are sums."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import numpy as np
import pytest
from support.interfaces import DECODER, ENCODER

from ryzen_compile.data.validation import validate_inputs
from ryzen_compile.errors import ShapeError
from ryzen_compile.spec.dims import resolve_dim
from ryzen_compile.spec.interface import InputSpec, Interface
from ryzen_compile.spec.profile import derive_profile

IDS = np.array([[1, 2, 3], [4, 5, 0]])
MASK = np.array([[1, 1, 1], [1, 1, 0]])


def test_valid_inputs_are_returned_in_the_order_of_the_interface() -> None:
    validated = validate_inputs({"attention_mask": MASK, "input_ids": IDS.tolist()}, ENCODER, source="it")
    assert list(validated) == ["input_ids", "attention_mask"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_id": IDS}, "it has an unknown input `input_id`"),
        ({"attention_mask": None}, r"it lacks the input attention_mask: int64\[batch, seq\]"),
        ({"input_ids": IDS.astype(np.int32)}, r"the input input_ids: int64\[batch, seq\] has element type int64, got int32"),
        ({"input_ids": IDS[0]}, "has 2 dimensions, got 3"),
        ({"input_ids": IDS[:, :2]}, "dimension `seq` is 2 in `input_ids` and 3 in `attention_mask`"),
        ({"input_ids": IDS + 96}, r"the ids of input_ids: .* must be in 0..99, got 96..101"),
        ({"attention_mask": MASK * 2}, r"the mask attention_mask: .* must contain only 0 and 1, got \[0.0, 2.0\]"),
    ],
)
def test_invalid_inputs_are_refused_with_expected_and_actual_values(change: dict[str, Any], message: str) -> None:
    inputs = {"input_ids": IDS, "attention_mask": MASK, **change}
    with pytest.raises(ShapeError, match=message):
        validate_inputs({name: array for name, array in inputs.items() if array is not None}, ENCODER, source="it")


@pytest.mark.parametrize("padding_value", [0, 1, None])
@pytest.mark.parametrize("mask", [MASK, MASK[:, ::-1], 1 - MASK, np.array([[1, 0, 1], [0, 0, 0]])], ids=str)
def test_the_padding_of_a_sample_may_be_anywhere(padding_value: Literal[0, 1] | None, mask: np.ndarray[Any, Any]) -> None:
    ids, spec = ENCODER.inputs
    interface = Interface(inputs=(ids, msgspec.structs.replace(spec, padding_value=padding_value)), outputs=())
    validated = validate_inputs({"input_ids": IDS, "attention_mask": mask}, interface, source="it")
    assert np.array_equal(validated["attention_mask"], mask)


def test_an_input_that_is_not_known_to_be_a_mask_may_have_other_values() -> None:
    ids, spec = ENCODER.inputs
    interface = Interface(inputs=(ids, msgspec.structs.replace(spec, padding_value=None)), outputs=())
    validate_inputs({"input_ids": IDS, "attention_mask": MASK * 2}, interface, source="it")


def test_fixed_sizes_must_match() -> None:
    interface = Interface(inputs=(InputSpec(name="x", dtype="float32", dims=("n", 3)),), outputs=())
    with pytest.raises(ShapeError, match=r"axis 1 of the input x: float32\[n, 3\] is 3, got 4"):
        validate_inputs({"x": np.zeros((2, 4), np.float32)}, interface, source="it")


def test_string_inputs_are_text_or_object_arrays_of_strings() -> None:
    interface = Interface(inputs=(InputSpec(name="x", dtype="string", dims=("n",)),), outputs=())
    assert validate_inputs({"x": np.array(["a", "bc"], object)}, interface, source="it")["x"].tolist() == ["a", "bc"]
    with pytest.raises(ShapeError, match="has element type string, got object"):
        validate_inputs({"x": np.array(["a", 1], object)}, interface, source="it")


def test_input_of_unknown_rank_accepts_any_shape() -> None:
    interface = Interface(inputs=(InputSpec(name="x", dtype="float32", dims=None),), outputs=())
    assert validate_inputs({"x": np.zeros((2, 4), np.float32)}, interface, source="it")["x"].shape == (2, 4)


@pytest.mark.parametrize(
    ("dim", "size"), [(4, 4), ("past", 5), ("past+seq", 8), ("past + 1", 6), ("past+other", None), ("other", None)]
)
def test_dimension_is_resolved_by_name_or_as_a_sum(dim: int | str, size: int | None) -> None:
    assert resolve_dim(dim, {"past": 5, "seq": 3}) == size


def test_derived_profile_is_consistent_with_sum_dimensions() -> None:
    profile = derive_profile(DECODER)
    for corner in (profile.min, profile.opt, profile.max):
        assert corner["attention_mask"][1] == corner["key"][2] + corner["input_ids"][1]


def test_batch_axis_is_the_axis_of_the_batch_dimension() -> None:
    assert DECODER.batch_axis(DECODER.input("key")) == 0
    assert Interface(inputs=(), outputs=()).batch_axis(DECODER.input("key")) is None
