"""Padding by the masks of ONNX files: a wrong real token fails whichever value marks padding, and right samples are taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest

from ryzen_compile import api
from ryzen_compile.errors import BackendError
from ryzen_compile.numerics.padding import PaddingMasks
from ryzen_compile.spec.interface import InputSpec, Interface, TensorSpec

Array = np.ndarray[Any, Any]
WEIGHTS = {"table": (20, 8), "wq": (8, 8), "wk": (8, 8)}
GRAPH = """<ir_version: 10, opset_import: ["" : 17]>
g (int64[batch, seq] tokens, bool[batch, seq] m) => (float[batch, seq, 8] y) {{
    far = Constant <value = float {{-1e9}}> ()  three = Constant <value = float {{3}}> ()
    rows = Constant <value = int64[1] {{1}}> ()  columns = Constant <value = int64[1] {{2}}> ()
    e = Gather (table, tokens)  q = MatMul (e, wq)  k = MatMul (e, wk)
    t = Transpose <perm = [0, 2, 1]> (k)  s = MatMul (q, t)
    mr = Unsqueeze (m, rows)  hidden = {mask} (mr)  f = Where (hidden, far, s)  p = Softmax (f)  right = MatMul (p, e)
    off = Add (right, three)  mc = Unsqueeze (m, columns)  y = {select}
}}"""
RIGHT, WRONG_WHERE_FALSE, WRONG_WHERE_TRUE = "Identity (right)", "Where (mc, right, off)", "Where (mc, off, right)"


def write(folder: Path, name: str, padding_value: Literal[0, 1], select: str = RIGHT) -> Path:
    model = onnx.parser.parse_model(GRAPH.format(mask="Identity" if padding_value else "Not", select=select))
    rng = np.random.default_rng(0)
    for weight, shape in WEIGHTS.items():
        array = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, weight))
    path = folder / f"{name}.onnx"
    onnx.save(model, path)
    return path


def compare(candidate: Path, baseline: Path, **options: Any) -> Any:
    options.setdefault("max_shapes", ["tokens:3x9,m:3x9"])
    return api.compare(candidate, baseline, **options).comparisons[0]


def left_out_of(comparison: Any) -> float:
    return sum(metric.worst for metric in comparison.accuracy.metrics if metric.name == "left_out")


@pytest.mark.parametrize("padding_value", [0, 1])
def test_wrong_tokens_fail_and_wrong_padding_does_not_whichever_value_marks_padding(
    padding_value: Literal[0, 1], tmp_path: Path
) -> None:
    right = write(tmp_path, "right", padding_value)
    wrong = {
        value: write(tmp_path, f"wrong{value}", padding_value, select)
        for value, select in ((0, WRONG_WHERE_FALSE), (1, WRONG_WHERE_TRUE))
    }
    assert compare(right, right).met
    assert not compare(wrong[1 - padding_value], right).met
    in_padding = compare(wrong[padding_value], right)
    assert in_padding.met
    assert 0.1 < left_out_of(in_padding) < 0.5


@pytest.mark.parametrize("padding_value", [0, 1])
@pytest.mark.parametrize("side", ["left", "right"])
def test_right_samples_are_taken_and_their_padding_is_left_out(padding_value: Literal[0, 1], side: str, tmp_path: Path) -> None:
    lengths = np.array([[7], [3], [2], [1]])
    is_padding = np.arange(7) >= lengths if side == "right" else np.arange(7) < 7 - lengths
    samples = tmp_path / "samples.npz"
    tokens = np.random.default_rng(1).integers(0, 20, (4, 7))
    np.savez(samples, tokens=tokens, m=is_padding if padding_value else ~is_padding)
    right = write(tmp_path, "right", padding_value)
    wrong = write(tmp_path, "wrong", padding_value, WRONG_WHERE_FALSE if padding_value else WRONG_WHERE_TRUE)
    for options in ({"as_given": True}, {}):
        result = compare(right, right, data=str(samples), **options)
        assert result.met
        assert left_out_of(result) > 0.1
        assert not compare(wrong, right, data=str(samples), **options).met


def padding_masks(*masks: InputSpec) -> PaddingMasks:
    ids = InputSpec(name="ids", dtype="int64", dims=("batch", "seq"), role="ids", high=9)
    outputs = (TensorSpec(name="y", dtype="float32", dims=("batch", "seq", 4)),)
    return PaddingMasks(Interface(inputs=(ids, *masks), outputs=outputs, batch="batch"))


def mask(dims: tuple[str | int, ...], padding_value: Literal[0, 1] | None = 0) -> InputSpec:
    return InputSpec(name="m", dtype="int64", dims=dims, role="mask", padding_value=padding_value)


def means_of_valid(inputs: Any) -> dict[str, Array]:
    """Return for each token the mean of all valid tokens, plus the token itself."""
    is_valid = (inputs["m"].reshape(len(inputs["m"]), -1) == 1)[:, :, None]
    ids = inputs["ids"][:, :, None].astype(np.float32)
    return {"y": np.repeat(ids + (ids * is_valid).sum(axis=1, keepdims=True) / is_valid.sum(axis=1, keepdims=True), 4, axis=2)}


INPUTS = {"ids": np.array([[1, 2, 3]]), "m": np.array([[1, 1, 0]])}


def test_nothing_is_left_out_before_a_mask_is_checked() -> None:
    masks = padding_masks(mask(("batch", "seq")))
    y = means_of_valid(INPUTS)["y"]
    assert masks.valid_elements("y", y, INPUTS) is None
    assert masks.is_pending(INPUTS)
    masks.check(INPUTS, means_of_valid)
    assert not masks.is_pending(INPUTS)
    assert np.array_equal(masks.valid_elements("y", y, INPUTS), [[True, True, False]])
    assert masks.valid_elements("z", y, INPUTS) is None
    assert masks.notes == []


def test_the_axes_between_rows_and_tokens_may_be_of_size_1() -> None:
    inputs = {**INPUTS, "m": INPUTS["m"].reshape(1, 1, 1, 3)}
    masks = padding_masks(mask(("batch", 1, 1, "seq")))
    masks.check(inputs, means_of_valid)
    assert np.array_equal(masks.valid_elements("y", means_of_valid(inputs)["y"], inputs), [[True, True, False]])


@pytest.mark.parametrize("inputs", [{**INPUTS, "m": np.ones((1, 3))}, {"ids": np.array([[1]]), "m": np.array([[0]])}])
def test_a_mask_is_checked_on_rows_of_several_tokens_with_padding(inputs: dict[str, Array]) -> None:
    assert not padding_masks(mask(("batch", "seq"))).is_pending(inputs)


@pytest.mark.parametrize("dims", [("seq", "seq"), ("batch", "seq", "seq"), ("batch", "other"), ("batch",)])
def test_other_masks_are_not_checked(dims: tuple[str, ...]) -> None:
    masks = padding_masks(mask(dims))
    masks.check({**INPUTS, "m": np.zeros((1,) * len(dims))}, means_of_valid)
    assert masks.notes == []


LONG = {"ids": np.arange(40)[None] % 10, "m": np.ones((1, 40), np.int64)}


@pytest.mark.parametrize("takes_few_tokens", [True, False])
def test_the_influence_of_a_valid_token_is_looked_for_in_few_tokens_first(takes_few_tokens: bool) -> None:
    states = InputSpec(name="past", dtype="float32", dims=("batch", "past", 2), role="state")
    masks = padding_masks(mask(("batch", "past+seq")), states)
    token_counts: list[int] = []

    def run(inputs: Any) -> dict[str, Array]:
        ids, tokens = inputs["ids"], inputs["ids"].shape[1]
        if tokens < 40 and not takes_few_tokens:
            raise BackendError("takes 40 tokens")
        assert inputs["past"].shape == (1, 3, 2)
        assert inputs["m"].shape == (1, 3 + tokens)
        token_counts.append(tokens)
        return means_of_valid({"ids": ids, "m": inputs["m"][:, 3:]})

    masks.check({**LONG, "m": np.ones((1, 43), np.int64), "past": np.zeros((1, 3, 2), np.float32)}, run)
    assert masks.notes == []
    assert token_counts == [40, 40, *([16, 16] if takes_few_tokens else [40, 40])]


@pytest.mark.parametrize(("distance", "reads_padding"), [(20, False), (20, True), (32, True)])
def test_an_influence_over_many_tokens_is_found(distance: int, reads_padding: bool) -> None:
    masks = padding_masks(mask(("batch", "seq")))

    def run(inputs: Any) -> dict[str, Array]:
        shifted = np.zeros(inputs["ids"].shape, np.float32)
        valid = np.ones_like(inputs["m"]) if reads_padding else inputs["m"]
        shifted[:, distance:] = (inputs["ids"] * valid)[:, :-distance]
        nearby = means_of_valid(inputs)["y"] if reads_padding else np.zeros((*shifted.shape, 4), np.float32)
        return {"y": nearby + shifted[:, :, None]}

    masks.check(LONG, run)
    assert (masks.notes == []) != reads_padding


@pytest.mark.parametrize(
    "other",
    [
        InputSpec(name="n", dtype="int64", dims=("batch",), role="lengths", length_dim="seq"),
        InputSpec(name="n", dtype="int64", dims=("seq - 1",)),
        InputSpec(name="n", dtype="int64", dims=None),
    ],
)
def test_inputs_whose_dims_do_not_show_their_tokens_are_not_cut(other: InputSpec) -> None:
    masks = padding_masks(mask(("batch", "seq")), other)
    token_counts = set()

    def run(inputs: Any) -> dict[str, Array]:
        token_counts.add(inputs["ids"].shape[1])
        return means_of_valid(inputs)

    masks.check({**LONG, "n": np.full(39 if other.dims == ("seq - 1",) else 1, 40)}, run)
    assert token_counts == {40}
