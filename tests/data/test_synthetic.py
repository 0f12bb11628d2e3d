"""Tests of synthetic inputs: types, ranges, roles, seeds and the relation of rows."""

from __future__ import annotations

import os

import ml_dtypes
import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.interfaces import DECODER, ENCODER, decoder_shapes, encoder_shapes

from ryzen_compile.data import synthetic
from ryzen_compile.data.synthetic import RowMode, synthesize
from ryzen_compile.data.validation import validate_inputs
from ryzen_compile.errors import ShapeError
from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.spec.interface import InputSpec, Interface, Role

ELEMENT_TYPES = [name for name in ir.DataType.__members__ if name != "UNDEFINED"]


def one_input_interface(dtype: str, *, role: Role = "values", low: float | None = None, high: float | None = None) -> Interface:
    spec = InputSpec(name="x", dtype=dtype, dims=("n", 50), role=role, low=low, high=high)
    return Interface(inputs=(spec,), outputs=(), batch="n")


@pytest.mark.parametrize("element", ELEMENT_TYPES)
def test_every_onnx_element_type_has_finite_and_varied_values(element: str) -> None:
    dtype = ir.DataType[element]
    name = "string" if dtype == ir.DataType.STRING else str(dtype.numpy())
    array = synthesize(one_input_interface(name), {"x": (4, 50)}, seed=0, rows="mixed")["x"]
    assert array.shape == (4, 50)
    assert array.dtype.kind == "U" if name == "string" else array.dtype == dtype.numpy()
    assert len(set(array.ravel().tolist())) > 1
    if name != "string":
        assert np.isfinite(array.astype(np.complex128)).all()


def test_every_onnx_element_type_is_covered() -> None:
    onnx_types = {name for name, number in onnx.TensorProto.DataType.items() if number}
    assert onnx_types == set(ELEMENT_TYPES)


def test_unknown_element_type_is_refused() -> None:
    with pytest.raises(ShapeError, match="`float33` is not an element type"):
        numpy_dtype("float33")


@pytest.mark.parametrize(("dtype", "low", "high"), [("int64", -3, 5), ("uint8", 250, 255), ("int4", -8, 7), ("float32", 2, 3)])
def test_values_cover_exactly_their_range(dtype: str, low: int, high: int) -> None:
    array = synthesize(one_input_interface(dtype, low=low, high=high), {"x": (40, 50)}, seed=0, rows="mixed")["x"].astype(
        np.float64
    )
    assert array.min() >= low
    assert array.max() <= high
    assert array.min() < low + 0.1
    assert array.max() > high - 0.1


def test_range_is_restricted_to_that_of_the_type() -> None:
    array = synthesize(one_input_interface("int8", low=-1000, high=1000), {"x": (40, 50)}, seed=0, rows="mixed")["x"]
    assert (array.min(), array.max()) == (-128, 127)


def test_range_outside_that_of_the_type_is_refused() -> None:
    with pytest.raises(ShapeError, match="its type has no value in the range 300..400"):
        synthesize(one_input_interface("uint8", low=300, high=400), {"x": (1, 50)}, seed=0, rows="mixed")


def test_inputs_are_determined_by_the_seed() -> None:
    shapes = encoder_shapes(3, 7)
    first, again = (synthesize(ENCODER, shapes, seed=5, rows="mixed") for _ in range(2))
    other = synthesize(ENCODER, shapes, seed=6, rows="mixed")
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["input_ids"], other["input_ids"])


THREADED: dict[str, Role] = {"a": "state", "b": "mask", "c": "positions", "d": "values"}


def test_inputs_made_in_threads_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = tuple(InputSpec(name=name, dtype="float32", dims=("batch", 8), role=role) for name, role in THREADED.items())
    interface, shapes = Interface(inputs=specs, outputs=(), batch="batch"), dict.fromkeys(THREADED, (3, 8))
    expected = synthesize(interface, shapes, seed=0, rows="mixed")
    monkeypatch.setattr(synthetic, "_MIN_PARALLEL_BYTES", 0)
    inputs = synthesize(interface, shapes, seed=0, rows="mixed")
    assert list(inputs) == list(expected)
    assert all(np.array_equal(inputs[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dims", [(), ("batch", 5)])
@pytest.mark.parametrize(
    ("dtype", "role"),
    [(dtype, "values") for dtype in ("string", "complex64", "float32", "bool", "int64")]
    + [("int64", "positions"), ("int64", "mask")],
)
def test_every_input_is_an_array_in_rows_that_may_be_written(dtype: str, dims: tuple[str | int, ...], role: Role) -> None:
    spec = InputSpec(name="x", dtype=dtype, dims=dims, role=role)
    interface = Interface(inputs=(spec,), outputs=(), batch="batch" if dims else None)
    array = synthesize(interface, {"x": (3, 5) if dims else ()}, seed=0, rows="mixed")["x"]
    assert isinstance(array, np.ndarray)
    assert array.flags.c_contiguous
    assert array.flags.writeable


def test_two_similar_inputs_have_different_values() -> None:
    specs = tuple(InputSpec(name=name, dtype="float32", dims=(8,)) for name in "ab")
    inputs = synthesize(Interface(inputs=specs, outputs=()), {"a": (8,), "b": (8,)}, seed=0, rows="mixed")
    assert not np.array_equal(inputs["a"], inputs["b"])


def test_input_values_are_independent_of_other_inputs() -> None:
    alone = Interface(inputs=ENCODER.inputs[:1], outputs=(), batch="batch")
    both = synthesize(ENCODER, encoder_shapes(3, 7), seed=0, rows="mixed")
    assert np.array_equal(both["input_ids"], synthesize(alone, {"input_ids": (3, 7)}, seed=0, rows="mixed")["input_ids"])


def test_identical_rows_are_equal_and_have_full_length() -> None:
    inputs = synthesize(ENCODER, encoder_shapes(4, 9), seed=0, rows="identical")
    assert (inputs["input_ids"] == inputs["input_ids"][0]).all()
    assert inputs["attention_mask"].all()


def test_mixed_rows_differ_in_values_and_length() -> None:
    inputs = synthesize(ENCODER, encoder_shapes(4, 16), seed=0, rows="mixed")
    assert len({row.tobytes() for row in inputs["input_ids"]}) == 4
    assert sorted(inputs["attention_mask"].sum(1)) == [1, 6, 11, 16]


def test_mask_rows_are_at_least_one_1_followed_by_zeros() -> None:
    mask = synthesize(ENCODER, encoder_shapes(40, 3), seed=0, rows="mixed")["attention_mask"]
    assert (np.diff(mask, axis=1) <= 0).all()
    assert (mask[:, 0] == 1).all()


@pytest.mark.parametrize("rows", ["mixed", "identical"])
@pytest.mark.parametrize("count", [1, 5])
def test_no_row_is_all_padding_whichever_value_marks_it(count: int, rows: RowMode) -> None:
    ids, spec = ENCODER.inputs
    for padding_value in (0, 1, None):
        interface = msgspec.structs.replace(ENCODER, inputs=(ids, msgspec.structs.replace(spec, padding_value=padding_value)))
        mask = synthesize(interface, encoder_shapes(count, 3), seed=0, rows=rows)["attention_mask"]
        for value in (0, 1) if padding_value is None else (padding_value,):
            assert (mask != value).any(axis=1).all()


def test_padding_of_1_follows_the_valid_elements() -> None:
    spec = msgspec.structs.replace(ENCODER.inputs[1], padding_value=1)
    inverted = Interface(inputs=(spec,), outputs=(), batch="batch")
    mask = synthesize(inverted, {"attention_mask": (4, 16)}, seed=0, rows="mixed")["attention_mask"]
    assert (np.diff(mask, axis=1) >= 0).all()
    assert sorted(mask.sum(1)) == [0, 5, 10, 15]


@pytest.mark.parametrize("dims", [("n",), ("n", 1, "s"), ("n", 1, "q", "s")])
def test_masks_of_every_rank_are_prefixes_along_their_last_axis(dims: tuple[str | int, ...]) -> None:
    interface = Interface(
        inputs=(InputSpec(name="m", dtype="bool", dims=dims, role="mask", padding_value=0),), outputs=(), batch="n"
    )
    shape = tuple({"n": 4, "s": 6, "q": 2}.get(str(dim), 1) for dim in dims)
    mask = synthesize(interface, {"m": shape}, seed=0, rows="mixed")["m"]
    assert mask.shape == shape
    assert (np.diff(mask.astype(int), axis=-1) <= 0).all()
    if len(dims) > 1:
        assert len(set(mask.sum(-1).ravel().tolist())) == 4


def test_scalar_mask_and_scalar_position() -> None:
    specs = (
        InputSpec(name="m", dtype="bool", dims=(), role="mask", padding_value=0),
        InputSpec(name="p", dtype="int64", dims=(), role="positions"),
    )
    inputs = synthesize(Interface(inputs=specs, outputs=()), {"m": (), "p": ()}, seed=0, rows="mixed")
    assert inputs["m"].item() is True
    assert inputs["p"].item() == 0


@pytest.mark.parametrize("past", [0, 5])
def test_decoder_mask_covers_the_past_and_positions_continue_it(past: int) -> None:
    inputs = synthesize(DECODER, decoder_shapes(3, 4, past), seed=0, rows="mixed")
    assert sorted(inputs["attention_mask"].sum(1)) == [past + 1, past + 2, past + 4]
    assert (inputs["position_ids"] == np.arange(past, past + 4)).all()
    assert inputs["key"].shape == (3, 2, past, 4)


def test_step_of_one_token_has_a_full_mask() -> None:
    inputs = synthesize(DECODER, decoder_shapes(3, 1, 6), seed=0, rows="mixed")
    assert inputs["attention_mask"].all()
    assert (inputs["position_ids"] == 6).all()


def test_positions_above_their_range_are_refused() -> None:
    with pytest.raises(ShapeError, match="the model has 64 positions in `position_ids`, and the shapes need 69"):
        synthesize(DECODER, decoder_shapes(1, 4, 65), seed=0, rows="mixed")


def test_state_is_normally_distributed_unless_its_range_is_given() -> None:
    key = synthesize(DECODER, decoder_shapes(4, 1, 40), seed=0, rows="mixed")["key"]
    assert 0.9 < key.std() < 1.1
    state = synthesize(one_input_interface("float16", role="state", low=0, high=1), {"x": (4, 50)}, seed=0, rows="mixed")["x"]
    assert 0 <= state.min() <= state.max() <= 1


def test_inconsistent_shapes_are_refused() -> None:
    with pytest.raises(ShapeError, match="`seq` is 7 in `input_ids` and 8 in `attention_mask`"):
        synthesize(ENCODER, {"input_ids": (3, 7), "attention_mask": (3, 8)}, seed=0, rows="mixed")
    with pytest.raises(ShapeError, match=r"axis 1 of the input .* is past\+seq = 9, got 8"):
        synthesize(DECODER, {**decoder_shapes(1, 4, 5), "attention_mask": (1, 8)}, seed=0, rows="mixed")


def test_synthetic_inputs_pass_validation() -> None:
    for rows in ("mixed", "identical"):
        validate_inputs(synthesize(DECODER, decoder_shapes(3, 4, 5), seed=1, rows=rows), DECODER, source="synthetic")


def test_empty_tensors() -> None:
    assert synthesize(ENCODER, encoder_shapes(0, 3), seed=0, rows="mixed")["input_ids"].shape == (0, 3)
    assert synthesize(ENCODER, encoder_shapes(2, 0), seed=0, rows="mixed")["attention_mask"].shape == (2, 0)


def test_type_without_zero_or_sign_has_no_nan() -> None:
    scale = synthesize(one_input_interface("float8_e8m0fnu"), {"x": (4, 50)}, seed=0, rows="mixed")["x"]
    assert scale.dtype == ml_dtypes.float8_e8m0fnu
    assert (scale.astype(np.float32) > 0).all()


@pytest.mark.parametrize("rows", [10**9, 10**14, 2**63, 10**30])
def test_inputs_larger_than_memory_are_refused_with_their_size(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ryzen_compile.data.synthetic.physical_memory_bytes", lambda: 10**10)
    with pytest.raises(
        ShapeError, match=rf"inputs of shape x:{rows}x50 do not fit into memory: they need {rows * 50 * 4} bytes"
    ):
        synthesize(one_input_interface("float32"), {"x": (rows, 50)}, seed=0, rows="mixed")


@pytest.mark.parametrize("rows", [10**15, 2**63, 10**30])
def test_too_large_inputs_are_refused_if_the_memory_size_is_unknown(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def sysconf(_: str) -> int:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "sysconf", sysconf)
    with pytest.raises(ShapeError, match=f"do not fit into memory: they need {rows * 50 * 8} bytes"):
        synthesize(one_input_interface("int64"), {"x": (rows, 50)}, seed=0, rows="identical")
