"""Synthetic feeds: types, ranges, roles, seeds, and what rows have to do with each other."""

from __future__ import annotations

import os

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.interfaces import DECODER, ENCODER, decoder_shapes, encoder_shapes

from ryzen_compile.data.synthetic import synthesize
from ryzen_compile.data.validation import validate_inputs
from ryzen_compile.errors import ShapeError
from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.spec.interface import InputSpec, Interface, Role

ELEMENTS = [name for name in ir.DataType.__members__ if name != "UNDEFINED"]


def one(dtype: str, *, role: Role = "values", low: float | None = None, high: float | None = None) -> Interface:
    spec = InputSpec(name="x", dtype=dtype, dims=("n", 50), role=role, low=low, high=high)
    return Interface(inputs=(spec,), outputs=(), batch="n")


@pytest.mark.parametrize("element", ELEMENTS)
def test_every_element_type_of_onnx_is_made_finite_and_varied(element: str) -> None:
    kind = ir.DataType[element]
    name = "string" if kind == ir.DataType.STRING else str(kind.numpy())
    array = synthesize(one(name), {"x": (4, 50)}, seed=0, rows="mixed")["x"]
    assert array.shape == (4, 50)
    assert array.dtype.kind == "U" if name == "string" else array.dtype == kind.numpy()
    assert len(set(array.ravel().tolist())) > 1
    if name != "string":
        assert np.isfinite(array.astype(np.complex128)).all()


def test_every_element_type_of_onnx_is_covered() -> None:
    known = {name for name, number in onnx.TensorProto.DataType.items() if number}
    assert known == set(ELEMENTS)


def test_an_unknown_element_type_is_named() -> None:
    with pytest.raises(ShapeError, match="`float33` is not an element type"):
        numpy_dtype("float33")


@pytest.mark.parametrize(("dtype", "low", "high"), [("int64", -3, 5), ("uint8", 250, 255), ("int4", -8, 7), ("float32", 2, 3)])
def test_values_fill_their_range_and_no_more(dtype: str, low: int, high: int) -> None:
    array = synthesize(one(dtype, low=low, high=high), {"x": (40, 50)}, seed=0, rows="mixed")["x"].astype(np.float64)
    assert array.min() >= low
    assert array.max() <= high
    assert array.min() < low + 0.1
    assert array.max() > high - 0.1


def test_a_range_is_cut_to_what_the_type_can_hold() -> None:
    array = synthesize(one("int8", low=-1000, high=1000), {"x": (40, 50)}, seed=0, rows="mixed")["x"]
    assert (array.min(), array.max()) == (-128, 127)


def test_a_range_that_the_type_cannot_hold_is_refused() -> None:
    with pytest.raises(ShapeError, match="no value lies in 300..400"):
        synthesize(one("uint8", low=300, high=400), {"x": (1, 50)}, seed=0, rows="mixed")


def test_one_seed_makes_one_feed_and_another_another() -> None:
    shapes = encoder_shapes(3, 7)
    first, again = (synthesize(ENCODER, shapes, seed=5, rows="mixed") for _ in range(2))
    other = synthesize(ENCODER, shapes, seed=6, rows="mixed")
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["input_ids"], other["input_ids"])


def test_two_inputs_of_one_kind_have_values_of_their_own() -> None:
    inputs = tuple(InputSpec(name=name, dtype="float32", dims=(8,)) for name in "ab")
    feed = synthesize(Interface(inputs=inputs, outputs=()), {"a": (8,), "b": (8,)}, seed=0, rows="mixed")
    assert not np.array_equal(feed["a"], feed["b"])


def test_an_input_keeps_its_values_when_another_is_added() -> None:
    alone = Interface(inputs=ENCODER.inputs[:1], outputs=(), batch="batch")
    both = synthesize(ENCODER, encoder_shapes(3, 7), seed=0, rows="mixed")
    assert np.array_equal(both["input_ids"], synthesize(alone, {"input_ids": (3, 7)}, seed=0, rows="mixed")["input_ids"])


def test_identical_rows_are_equal_and_count_in_full() -> None:
    feed = synthesize(ENCODER, encoder_shapes(4, 9), seed=0, rows="identical")
    assert (feed["input_ids"] == feed["input_ids"][0]).all()
    assert feed["attention_mask"].all()


def test_mixed_rows_differ_in_values_and_in_length_from_full_to_one() -> None:
    feed = synthesize(ENCODER, encoder_shapes(4, 16), seed=0, rows="mixed")
    assert len({row.tobytes() for row in feed["input_ids"]}) == 4
    assert sorted(feed["attention_mask"].sum(1)) == [1, 6, 11, 16]


def test_a_mask_is_ones_and_then_zeros_with_at_least_a_one() -> None:
    mask = synthesize(ENCODER, encoder_shapes(40, 3), seed=0, rows="mixed")["attention_mask"]
    assert (np.diff(mask, axis=1) <= 0).all()
    assert (mask[:, 0] == 1).all()


@pytest.mark.parametrize("dims", [("n",), ("n", 1, "s"), ("n", 1, "q", "s")])
def test_masks_of_every_rank_are_prefixes_along_their_last_axis(dims: tuple[str | int, ...]) -> None:
    interface = Interface(inputs=(InputSpec(name="m", dtype="bool", dims=dims, role="mask"),), outputs=(), batch="n")
    shape = tuple({"n": 4, "s": 6, "q": 2}.get(str(dim), 1) for dim in dims)
    mask = synthesize(interface, {"m": shape}, seed=0, rows="mixed")["m"]
    assert mask.shape == shape
    assert (np.diff(mask.astype(int), axis=-1) <= 0).all()
    if len(dims) > 1:
        assert len(set(mask.sum(-1).ravel().tolist())) == 4


def test_a_scalar_mask_and_a_scalar_position_are_made() -> None:
    inputs = (
        InputSpec(name="m", dtype="bool", dims=(), role="mask"),
        InputSpec(name="p", dtype="int64", dims=(), role="positions"),
    )
    feed = synthesize(Interface(inputs=inputs, outputs=()), {"m": (), "p": ()}, seed=0, rows="mixed")
    assert feed["m"].item() is True
    assert feed["p"].item() == 0


@pytest.mark.parametrize("past", [0, 5])
def test_a_decoders_mask_covers_all_of_the_past_and_positions_go_on_from_it(past: int) -> None:
    feed = synthesize(DECODER, decoder_shapes(3, 4, past), seed=0, rows="mixed")
    assert sorted(feed["attention_mask"].sum(1)) == [past + 1, past + 2, past + 4]
    assert (feed["position_ids"] == np.arange(past, past + 4)).all()
    assert feed["key"].shape == (3, 2, past, 4)


def test_a_step_of_one_sees_all_of_the_past() -> None:
    feed = synthesize(DECODER, decoder_shapes(3, 1, 6), seed=0, rows="mixed")
    assert feed["attention_mask"].all()
    assert (feed["position_ids"] == 6).all()


def test_positions_beyond_their_range_are_refused() -> None:
    with pytest.raises(ShapeError, match="`position_ids` would count up to 68, and takes at most 63"):
        synthesize(DECODER, decoder_shapes(1, 4, 65), seed=0, rows="mixed")


def test_a_state_is_spread_like_activations_unless_its_range_is_known() -> None:
    key = synthesize(DECODER, decoder_shapes(4, 1, 40), seed=0, rows="mixed")["key"]
    assert 0.9 < key.std() < 1.1
    known = synthesize(one("float16", role="state", low=0, high=1), {"x": (4, 50)}, seed=0, rows="mixed")["x"]
    assert 0 <= known.min() <= known.max() <= 1


def test_shapes_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ShapeError, match="`seq` is 7 in `input_ids` and 8 in `attention_mask`"):
        synthesize(ENCODER, {"input_ids": (3, 7), "attention_mask": (3, 8)}, seed=0, rows="mixed")
    with pytest.raises(ShapeError, match=r"axis 1 of the input .* is past\+seq = 9, got 8"):
        synthesize(DECODER, {**decoder_shapes(1, 4, 5), "attention_mask": (1, 8)}, seed=0, rows="mixed")


def test_what_is_made_fits_the_contract_that_real_samples_are_held_to() -> None:
    for rows in ("mixed", "identical"):
        validate_inputs(synthesize(DECODER, decoder_shapes(3, 4, 5), seed=1, rows=rows), DECODER, source="synthetic")


def test_empty_tensors_are_made() -> None:
    assert synthesize(ENCODER, encoder_shapes(0, 3), seed=0, rows="mixed")["input_ids"].shape == (0, 3)
    assert synthesize(ENCODER, encoder_shapes(2, 0), seed=0, rows="mixed")["attention_mask"].shape == (2, 0)


def test_a_type_without_zero_or_signs_is_made_without_nan() -> None:
    scale = synthesize(one("float8_e8m0fnu"), {"x": (4, 50)}, seed=0, rows="mixed")["x"]
    assert scale.dtype == ml_dtypes.float8_e8m0fnu
    assert (scale.astype(np.float32) > 0).all()


@pytest.mark.parametrize("rows", [10**9, 10**14, 2**63, 10**30])
def test_what_no_memory_holds_is_refused_with_its_size(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ryzen_compile.data.synthetic._memory_bytes", lambda: 10**10)
    with pytest.raises(ShapeError, match=rf"a sample of x:{rows}x50 cannot be made: it takes {rows * 50 * 4} bytes"):
        synthesize(one("float32"), {"x": (rows, 50)}, seed=0, rows="mixed")


@pytest.mark.parametrize("rows", [10**15, 2**63, 10**30])
def test_a_machine_that_does_not_tell_its_memory_refuses_all_the_same(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def sysconf(_: str) -> int:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "sysconf", sysconf)
    with pytest.raises(ShapeError, match=f"takes {rows * 50 * 8} bytes"):
        synthesize(one("int64"), {"x": (rows, 50)}, seed=0, rows="identical")
