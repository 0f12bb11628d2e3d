"""Tests of the reshaping of real samples to the shapes of a comparison."""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np
import pytest
from support.interfaces import DECODER, ENCODER, decoder_shapes, encoder_shapes

from ryzen_compile.data.reshaping import reshape_samples
from ryzen_compile.data.synthetic import synthesize
from ryzen_compile.data.validation import validate_inputs
from ryzen_compile.errors import ShapeError
from ryzen_compile.spec.interface import InputSpec, Interface

SAMPLE = {
    "input_ids": np.array([[11, 12, 13, 14], [21, 22, 0, 0], [31, 32, 33, 0]]),
    "attention_mask": np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]),
}
IMAGES = Interface(inputs=(InputSpec(name="x", dtype="float32", dims=("n", 3, "h")),), outputs=(), batch="n")


def test_first_row_is_filled_from_the_next_rows_and_others_are_padded() -> None:
    inputs = reshape_samples([SAMPLE], ENCODER, encoder_shapes(3, 6), seed=0, rows="mixed")
    assert inputs["input_ids"].tolist() == [[11, 12, 13, 14, 21, 22], [21, 22, 0, 0, 0, 0], [31, 32, 33, 0, 0, 0]]
    assert inputs["attention_mask"].sum(1).tolist() == [6, 2, 3]


def with_mask(padding_value: Literal[0, 1] | None) -> Interface:
    ids, mask = ENCODER.inputs
    return msgspec.structs.replace(ENCODER, inputs=(ids, msgspec.structs.replace(mask, padding_value=padding_value)))


def test_padding_of_1_is_kept() -> None:
    sample = {**SAMPLE, "attention_mask": 1 - SAMPLE["attention_mask"]}
    inputs = reshape_samples([sample], with_mask(1), encoder_shapes(3, 6), seed=0, rows="mixed")
    assert inputs["input_ids"].tolist() == [[11, 12, 13, 14, 21, 22], [21, 22, 0, 0, 0, 0], [31, 32, 33, 0, 0, 0]]
    assert inputs["attention_mask"].tolist() == [[0] * 6, [0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]]


def test_left_padding_stays_on_the_left() -> None:
    sample = {"input_ids": np.array([[11, 12, 13], [0, 21, 22]]), "attention_mask": np.array([[1, 1, 1], [0, 1, 1]])}
    inputs = reshape_samples([sample], ENCODER, encoder_shapes(2, 5), seed=0, rows="mixed")
    assert inputs["input_ids"].tolist() == [[11, 12, 13, 21, 22], [0, 0, 0, 21, 22]]
    assert inputs["attention_mask"].tolist() == [[1] * 5, [0, 0, 0, 1, 1]]


def test_padding_between_valid_elements_is_dropped() -> None:
    sample = {"input_ids": np.array([[11, 0, 12, 0]]), "attention_mask": np.array([[1, 0, 1, 0]])}
    inputs = reshape_samples([sample], ENCODER, encoder_shapes(1, 4), seed=0, rows="mixed")
    assert inputs["input_ids"].tolist() == [[11, 12, 11, 12]]


def test_left_padding_of_a_step_follows_the_past() -> None:
    sample = synthesize(DECODER, decoder_shapes(2, 4, 3), seed=8, rows="mixed")
    sample["attention_mask"] = np.array([[1] * 7, [1, 1, 1, 0, 0, 1, 1]])
    inputs = reshape_samples([sample], DECODER, decoder_shapes(2, 6, 2), seed=1, rows="mixed")
    assert inputs["attention_mask"].tolist() == [[1] * 8, [1, 1, 0, 0, 1, 1, 1, 1]]
    assert inputs["input_ids"][1].tolist() == [0, 0, *sample["input_ids"][0]]


def test_elements_repeat_if_the_padding_value_is_unknown() -> None:
    inputs = reshape_samples([SAMPLE], with_mask(None), encoder_shapes(3, 6), seed=0, rows="mixed")
    assert inputs["input_ids"][1].tolist() == [21, 22, 0, 0, 21, 22]
    assert inputs["attention_mask"][1].tolist() == [1, 1, 0, 0, 1, 1]


def test_rows_are_truncated_to_a_shorter_length() -> None:
    inputs = reshape_samples([SAMPLE], ENCODER, encoder_shapes(3, 2), seed=0, rows="mixed")
    assert inputs["input_ids"].tolist() == [[11, 12], [21, 22], [31, 32]]
    assert inputs["attention_mask"].all()


def test_seed_selects_the_first_row() -> None:
    inputs = reshape_samples([SAMPLE], ENCODER, encoder_shapes(2, 3), seed=1, rows="mixed")
    assert inputs["input_ids"].tolist() == [[21, 22, 31], [31, 32, 33]]


def test_identical_rows_are_copies_of_the_full_first_row() -> None:
    inputs = reshape_samples([SAMPLE], ENCODER, encoder_shapes(2, 12), seed=0, rows="identical")
    assert inputs["input_ids"].tolist() == [[11, 12, 13, 14, 21, 22, 31, 32, 33, 11, 12, 13]] * 2
    assert inputs["attention_mask"].all()


def test_additional_rows_concatenate_two_rows_and_then_are_synthetic() -> None:
    shapes = encoder_shapes(11, 8)
    inputs = reshape_samples([SAMPLE], ENCODER, shapes, seed=0, rows="mixed")
    assert inputs["input_ids"][3].tolist() == [11, 12, 13, 14, 21, 22, 0, 0]
    assert inputs["input_ids"][6].tolist() == [11, 12, 13, 14, 31, 32, 33, 0]
    synthetic = synthesize(ENCODER, shapes, seed=0, rows="mixed")
    assert np.array_equal(inputs["input_ids"][9:], synthetic["input_ids"][9:])
    assert len({row.tobytes() for row in inputs["input_ids"]}) == 11
    validate_inputs(inputs, ENCODER, source="it")


def test_inputs_without_samples_are_synthetic() -> None:
    shapes = encoder_shapes(2, 5)
    synthetic = synthesize(ENCODER, shapes, seed=3, rows="mixed")
    assert all(
        np.array_equal(synthetic[name], array)
        for name, array in reshape_samples([], ENCODER, shapes, seed=3, rows="mixed").items()
    )


def test_unmasked_dimensions_repeat_their_elements() -> None:
    sample = {"x": np.arange(12, dtype=np.float32).reshape(2, 3, 2)}
    inputs = reshape_samples([sample], IMAGES, {"x": (2, 3, 5)}, seed=0, rows="mixed")
    assert inputs["x"][1, 0].tolist() == [6, 7, 6, 7, 6]


def test_scalars_are_those_of_the_first_sample() -> None:
    specs = (InputSpec(name="n", dtype="int64", dims=()), IMAGES.inputs[0])
    sample = {"n": np.array(7), "x": np.ones((1, 3, 2), np.float32)}
    interface = Interface(inputs=specs, outputs=(), batch="n")
    inputs = reshape_samples([sample], interface, {"n": (), "x": (2, 3, 4)}, seed=0, rows="mixed")
    assert inputs["n"].tolist() == 7


def test_unmasked_rows_beyond_the_samples_are_synthetic() -> None:
    sample = {"x": np.full((1, 3, 2), 9, np.float32)}
    inputs = reshape_samples([sample], IMAGES, {"x": (3, 3, 2)}, seed=0, rows="mixed")
    assert (inputs["x"][0] == 9).all()
    assert np.abs(inputs["x"][1:]).max() <= 1
    assert (reshape_samples([sample], IMAGES, {"x": (3, 3, 2)}, seed=0, rows="identical")["x"] == 9).all()


@pytest.mark.parametrize("past", [0, 3, 7])
def test_decoder_inputs_keep_ids_and_get_mask_and_positions_for_the_past(past: int) -> None:
    sample = synthesize(DECODER, decoder_shapes(2, 4, 3), seed=8, rows="mixed")
    inputs = reshape_samples([sample], DECODER, decoder_shapes(2, 2, past), seed=0, rows="mixed")
    validate_inputs(inputs, DECODER, source="it")
    assert np.array_equal(inputs["input_ids"][0], sample["input_ids"][0, :2])
    assert inputs["attention_mask"][0].all()
    assert (inputs["position_ids"] == np.arange(past, past + 2)).all()
    assert np.array_equal(inputs["key"][:, :, : min(past, 3)], sample["key"][:, :, : min(past, 3)])


def test_state_without_elements_gets_synthetic_values() -> None:
    sample = synthesize(DECODER, decoder_shapes(2, 4, 0), seed=8, rows="mixed")
    inputs = reshape_samples([sample], DECODER, decoder_shapes(2, 4, 6), seed=0, rows="mixed")
    assert inputs["key"].std() > 0.5


def test_fixed_length_is_unchanged() -> None:
    specs = (
        InputSpec(name="ids", dtype="int64", dims=("n", 4), role="ids", high=99),
        InputSpec(name="mask", dtype="int64", dims=("n", 4), role="mask", padding_value=0),
    )
    sample = {"ids": SAMPLE["input_ids"], "mask": SAMPLE["attention_mask"]}
    inputs = reshape_samples(
        [sample], Interface(inputs=specs, outputs=(), batch="n"), {"ids": (3, 4), "mask": (3, 4)}, seed=0, rows="mixed"
    )
    assert np.array_equal(inputs["ids"], sample["ids"])
    assert np.array_equal(inputs["mask"], sample["mask"])


def test_mask_over_the_past_and_one_element_is_full() -> None:
    specs = (
        InputSpec(name="ids", dtype="int64", dims=("n", 1), role="ids", high=99),
        InputSpec(name="mask", dtype="int64", dims=("n", "past + 1"), role="mask", padding_value=0),
        DECODER.input("key"),
    )
    interface = Interface(
        inputs=(*specs[:2], msgspec.structs.replace(specs[2], dims=("n", 2, "past", 4))),
        outputs=(),
        states=DECODER.states,
        batch="n",
    )
    small, large = ({"ids": (2, 1), "mask": (2, past + 1), "key": (2, 2, past, 4)} for past in (2, 5))
    inputs = reshape_samples([synthesize(interface, small, seed=0, rows="mixed")], interface, large, seed=0, rows="mixed")
    assert inputs["mask"].all()
    validate_inputs(inputs, interface, source="it")


def test_inconsistent_shapes_are_refused() -> None:
    with pytest.raises(ShapeError, match="`seq` is 2"):
        reshape_samples([SAMPLE], ENCODER, {"input_ids": (1, 2), "attention_mask": (1, 3)}, seed=0, rows="mixed")


def test_lengths_end_at_the_size_of_their_dim() -> None:
    x = InputSpec(name="x", dtype="float32", dims=("n", "time"))
    lengths = InputSpec(name="lengths", dtype="int64", dims=("n",), role="lengths", length_dim="time")
    interface = Interface(inputs=(x, lengths), outputs=(), batch="n")
    sample = {"x": np.ones((2, 9), np.float32), "lengths": np.array([9, 3])}
    inputs = reshape_samples([sample], interface, {"x": (2, 5), "lengths": (2,)}, seed=0, rows="mixed")
    assert inputs["lengths"].tolist() == [5, 3]
    longer = reshape_samples([sample], interface, {"x": (4, 20), "lengths": (4,)}, seed=0, rows="mixed")
    assert longer["lengths"][:2].tolist() == [20, 3], "a full row stays full"
    assert (longer["lengths"] >= 1).all()
    assert (longer["lengths"] <= 20).all()
