"""Real samples at the shapes that a comparison asks for."""

from __future__ import annotations

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
PICTURES = Interface(inputs=(InputSpec(name="x", dtype="float32", dims=("n", 3, "h")),), outputs=(), batch="n")


def test_the_first_row_goes_on_with_the_next_and_the_others_are_padded() -> None:
    feed = reshape_samples([SAMPLE], ENCODER, encoder_shapes(3, 6), seed=0, rows="mixed")
    assert feed["input_ids"].tolist() == [[11, 12, 13, 14, 21, 22], [21, 22, 0, 0, 0, 0], [31, 32, 33, 0, 0, 0]]
    assert feed["attention_mask"].sum(1).tolist() == [6, 2, 3]


def test_rows_are_cut_to_a_shorter_length() -> None:
    feed = reshape_samples([SAMPLE], ENCODER, encoder_shapes(3, 2), seed=0, rows="mixed")
    assert feed["input_ids"].tolist() == [[11, 12], [21, 22], [31, 32]]
    assert feed["attention_mask"].all()


def test_the_seed_chooses_the_first_row() -> None:
    feed = reshape_samples([SAMPLE], ENCODER, encoder_shapes(2, 3), seed=1, rows="mixed")
    assert feed["input_ids"].tolist() == [[21, 22, 31], [31, 32, 33]]


def test_identical_rows_repeat_the_first_in_full() -> None:
    feed = reshape_samples([SAMPLE], ENCODER, encoder_shapes(2, 12), seed=0, rows="identical")
    assert feed["input_ids"].tolist() == [[11, 12, 13, 14, 21, 22, 31, 32, 33, 11, 12, 13]] * 2
    assert feed["attention_mask"].all()


def test_more_rows_than_there_are_join_two_and_then_are_synthetic() -> None:
    shapes = encoder_shapes(11, 8)
    feed = reshape_samples([SAMPLE], ENCODER, shapes, seed=0, rows="mixed")
    assert feed["input_ids"][3].tolist() == [11, 12, 13, 14, 21, 22, 0, 0]
    assert feed["input_ids"][6].tolist() == [11, 12, 13, 14, 31, 32, 33, 0]
    made = synthesize(ENCODER, shapes, seed=0, rows="mixed")
    assert np.array_equal(feed["input_ids"][9:], made["input_ids"][9:])
    assert len({row.tobytes() for row in feed["input_ids"]}) == 11
    validate_inputs(feed, ENCODER, source="it")


def test_without_samples_all_is_synthetic() -> None:
    shapes = encoder_shapes(2, 5)
    made = synthesize(ENCODER, shapes, seed=3, rows="mixed")
    assert all(
        np.array_equal(made[name], array) for name, array in reshape_samples([], ENCODER, shapes, seed=3, rows="mixed").items()
    )


def test_pictures_keep_their_rows_and_repeat_along_what_no_mask_counts() -> None:
    sample = {"x": np.arange(12, dtype=np.float32).reshape(2, 3, 2)}
    feed = reshape_samples([sample], PICTURES, {"x": (2, 3, 5)}, seed=0, rows="mixed")
    assert feed["x"][1, 0].tolist() == [6, 7, 6, 7, 6]


def test_pictures_beyond_the_samples_are_synthetic_and_not_repeated() -> None:
    sample = {"x": np.full((1, 3, 2), 9, np.float32)}
    feed = reshape_samples([sample], PICTURES, {"x": (3, 3, 2)}, seed=0, rows="mixed")
    assert (feed["x"][0] == 9).all()
    assert np.abs(feed["x"][1:]).max() <= 1
    assert (reshape_samples([sample], PICTURES, {"x": (3, 3, 2)}, seed=0, rows="identical")["x"] == 9).all()


@pytest.mark.parametrize("past", [0, 3, 7])
def test_a_decoder_keeps_its_words_and_gets_mask_and_positions_for_its_past(past: int) -> None:
    sample = synthesize(DECODER, decoder_shapes(2, 4, 3), seed=8, rows="mixed")
    feed = reshape_samples([sample], DECODER, decoder_shapes(2, 2, past), seed=0, rows="mixed")
    validate_inputs(feed, DECODER, source="it")
    assert np.array_equal(feed["input_ids"][0], sample["input_ids"][0, :2])
    assert feed["attention_mask"][0].all()
    assert (feed["position_ids"] == np.arange(past, past + 2)).all()
    assert np.array_equal(feed["key"][:, :, : min(past, 3)], sample["key"][:, :, : min(past, 3)])


def test_a_state_without_elements_is_filled_with_synthetic_ones() -> None:
    sample = synthesize(DECODER, decoder_shapes(2, 4, 0), seed=8, rows="mixed")
    feed = reshape_samples([sample], DECODER, decoder_shapes(2, 4, 6), seed=0, rows="mixed")
    assert feed["key"].std() > 0.5


def test_a_length_that_is_fixed_stays_as_sampled() -> None:
    inputs = (
        InputSpec(name="ids", dtype="int64", dims=("n", 4), role="ids", high=99),
        InputSpec(name="mask", dtype="int64", dims=("n", 4), role="mask"),
    )
    sample = {"ids": SAMPLE["input_ids"], "mask": SAMPLE["attention_mask"]}
    feed = reshape_samples(
        [sample], Interface(inputs=inputs, outputs=(), batch="n"), {"ids": (3, 4), "mask": (3, 4)}, seed=0, rows="mixed"
    )
    assert np.array_equal(feed["ids"], sample["ids"])
    assert np.array_equal(feed["mask"], sample["mask"])


def test_a_mask_over_the_past_and_one_element_is_full() -> None:
    inputs = (
        InputSpec(name="ids", dtype="int64", dims=("n", 1), role="ids", high=99),
        InputSpec(name="mask", dtype="int64", dims=("n", "past + 1"), role="mask"),
        DECODER.input("key"),
    )
    interface = Interface(
        inputs=(*inputs[:2], msgspec.structs.replace(inputs[2], dims=("n", 2, "past", 4))),
        outputs=(),
        states=DECODER.states,
        batch="n",
    )
    small, large = ({"ids": (2, 1), "mask": (2, past + 1), "key": (2, 2, past, 4)} for past in (2, 5))
    feed = reshape_samples([synthesize(interface, small, seed=0, rows="mixed")], interface, large, seed=0, rows="mixed")
    assert feed["mask"].all()
    validate_inputs(feed, interface, source="it")


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeError, match="`seq` is 2"):
        reshape_samples([SAMPLE], ENCODER, {"input_ids": (1, 2), "attention_mask": (1, 3)}, seed=0, rows="mixed")
