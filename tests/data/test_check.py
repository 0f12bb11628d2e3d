"""The contract between data and an interface, and sizes that are sums of others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.interfaces import DECODER, ENCODER

from ryzen_compile.data.validation import validate_inputs
from ryzen_compile.errors import ShapeError
from ryzen_compile.spec.interface import InputSpec, Interface, resolve_dim
from ryzen_compile.spec.profile import derive_profile

IDS = np.array([[1, 2, 3], [4, 5, 0]])
MASK = np.array([[1, 1, 1], [1, 1, 0]])


def test_a_feed_that_fits_is_given_back_in_the_interfaces_order() -> None:
    found = validate_inputs({"attention_mask": MASK, "input_ids": IDS.tolist()}, ENCODER, source="it")
    assert list(found) == ["input_ids", "attention_mask"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"input_id": IDS}, "it holds `input_id`, which is not an input"),
        ({"attention_mask": None}, r"it lacks the input attention_mask: int64\[batch, seq\]"),
        ({"input_ids": IDS.astype(np.int32)}, r"the input input_ids: int64\[batch, seq\] holds int64, got int32"),
        ({"input_ids": IDS[0]}, "has 2 dimensions, got 3"),
        ({"input_ids": IDS[:, :2]}, "`seq` is 2 in `input_ids` and 3 in `attention_mask`"),
        ({"input_ids": IDS + 96}, r"the ids of input_ids: .* lie in 0..99, got 96..101"),
        ({"attention_mask": MASK * 2}, r"the mask attention_mask: .* holds 0 and 1, got \[0.0, 2.0\]"),
        ({"attention_mask": MASK[:, ::-1]}, "must be ones and then zeros"),
        ({"attention_mask": MASK * 0}, "must be ones and then zeros, with at least a one"),
    ],
)
def test_what_does_not_fit_is_named_with_what_was_expected_and_what_came(change: dict[str, Any], says: str) -> None:
    feed = {"input_ids": IDS, "attention_mask": MASK, **change}
    with pytest.raises(ShapeError, match=says):
        validate_inputs({name: array for name, array in feed.items() if array is not None}, ENCODER, source="it")


def test_a_fixed_size_is_held_to() -> None:
    interface = Interface(inputs=(InputSpec(name="x", dtype="float32", dims=("n", 3)),), outputs=())
    with pytest.raises(ShapeError, match=r"axis 1 of the input x: float32\[n, 3\] is 3, got 4"):
        validate_inputs({"x": np.zeros((2, 4), np.float32)}, interface, source="it")


def test_strings_come_as_text_or_as_objects_and_as_nothing_else() -> None:
    interface = Interface(inputs=(InputSpec(name="x", dtype="string", dims=("n",)),), outputs=())
    assert validate_inputs({"x": np.array(["a", "bc"], object)}, interface, source="it")["x"].tolist() == ["a", "bc"]
    with pytest.raises(ShapeError, match="holds string, got object"):
        validate_inputs({"x": np.array(["a", 1], object)}, interface, source="it")


def test_an_input_of_unknown_rank_takes_any_shape() -> None:
    interface = Interface(inputs=(InputSpec(name="x", dtype="float32", dims=None),), outputs=())
    assert validate_inputs({"x": np.zeros((2, 4), np.float32)}, interface, source="it")["x"].shape == (2, 4)


@pytest.mark.parametrize(
    ("dim", "size"), [(4, 4), ("past", 5), ("past+seq", 8), ("past + 1", 6), ("past+other", None), ("other", None)]
)
def test_the_size_of_a_dimension_is_its_own_or_the_sum_of_its_terms(dim: int | str, size: int | None) -> None:
    assert resolve_dim(dim, {"past": 5, "seq": 3}) == size


def test_a_derived_profile_gives_a_sum_the_sizes_of_its_terms() -> None:
    profile = derive_profile(DECODER)
    for corner in (profile.min, profile.opt, profile.max):
        assert corner["attention_mask"][1] == corner["key"][2] + corner["input_ids"][1]


def test_the_batch_axis_is_where_the_batch_stands() -> None:
    assert DECODER.batch_axis(DECODER.input("key")) == 0
    assert Interface(inputs=(), outputs=()).batch_axis(DECODER.input("key")) is None
