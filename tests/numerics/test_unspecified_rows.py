"""Caches of window size of GroupQueryAttention: rows that hold no token are unspecified, and left out of a comparison."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from support.genai_graphs import genai_graph, set_window
from support.ort_session import open_session

import ryzen_compile as rc
from ryzen_compile.ir.analysis.window_caches import held_rows
from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.ir.load import load
from ryzen_compile.numerics.onnx_candidates import onnx_candidate

WINDOW, HEADS, HEAD_SIZE = 9, 2, 16
PAST = "past_key_values.0.value"


def windowed() -> onnx.ModelProto:
    proto = genai_graph("llama")
    set_window(proto, 0, WINDOW)
    return proto


def zeros(proto: onnx.ModelProto, rows: int, length: int) -> dict[str, np.ndarray]:
    """Return empty caches: of `rows` for layer 0, and of `length` for others."""
    names = [value.name for value in proto.graph.input if value.name.startswith("past")]
    return {name: np.zeros((1, HEADS, rows if ".0." in name else length, HEAD_SIZE), np.float32) for name in names}


@pytest.mark.parametrize("capacity", [WINDOW, WINDOW + 3, 2 * WINDOW])
def test_rows_that_hold_tokens_are_those_of_the_op(capacity: int) -> None:
    proto = windowed()
    session, full = open_session(proto), open_session(genai_graph("llama"))
    names = [value.name for value in proto.graph.output]
    ids = np.random.default_rng(0).integers(0, 90, (1, 40))
    whole = full.run(
        ["present.0.value"],
        {"input_ids": ids, "attention_mask": np.ones((1, 40), np.int64), **zeros(proto, 0, 0)},
    )[0]
    caches = zeros(proto, capacity, 0)
    for tokens in range(1, 41):
        inputs = {"input_ids": ids[:, tokens - 1 : tokens], "attention_mask": np.ones((1, tokens), np.int64), **caches}
        outputs = dict(zip(names, session.run(names, inputs), strict=True))
        caches = {name.replace("present", "past_key_values"): array for name, array in outputs.items() if name != "logits"}
        (held,) = held_rows(np.array([tokens]), capacity=capacity, window=WINDOW)
        np.testing.assert_allclose(caches[PAST][:, :, :held], whole[:, :, tokens - held : tokens], atol=1e-5)


def test_a_cache_of_window_size_has_the_length_of_the_window(tmp_path: Path) -> None:
    onnx.save(windowed(), tmp_path / "m.onnx")
    interface = interface_of(load(tmp_path / "m.onnx"))
    states = {state.input: state.append_axis for state in interface.states}
    assert states == {f"past_key_values.{layer}.{kind}": 2 * layer or None for layer in range(2) for kind in ("key", "value")}
    dim = str((interface.input(PAST).dims or ())[2])
    assert (interface.min_sizes[dim], interface.typical_sizes[dim], interface.max_sizes[dim]) == (WINDOW,) * 3
    assert (interface.input("attention_mask").dims or ())[1] == "past_sequence_length+sequence_length"


def test_a_graph_with_caches_of_window_size_is_compared(tmp_path: Path) -> None:
    onnx.save(windowed(), tmp_path / "m.onnx")
    shapes = {"input_ids": (1, 2), "past_key_values.1.key": (1, HEADS, 1, HEAD_SIZE)}
    package = rc.build(tmp_path / "m.onnx", gpu="cpu", opt_shapes=shapes, cache=False)
    (accuracy,) = package.manifest.graphs[0].variants[0].accuracy
    assert accuracy.met
    assert accuracy.notes[-1].startswith("rows of `present.0.key`, `present.0.value` that hold no token are unspecified by ")


def test_unspecified_rows_are_zero_and_others_are_compared(tmp_path: Path) -> None:
    proto = windowed()
    onnx.save(proto, tmp_path / "m.onnx")
    wrong = onnx.ModelProto()
    wrong.CopyFrom(proto)
    (value,) = (value for value in wrong.graph.output if value.name == "present.0.value")
    producer = next(node for node in wrong.graph.node if value.name in node.output)
    producer.output[list(producer.output).index(value.name)] = "inner"
    wrong.graph.node.append(onnx.helper.make_node("Neg", ["inner"], [value.name]))
    onnx.save(wrong, tmp_path / "wrong.onnx")
    cache = f"1x{HEADS}x{WINDOW}x{HEAD_SIZE}"
    shapes = f"input_ids:1x2,attention_mask:1x3,past_key_values.0.key:{cache},past_key_values.1.key:1x{HEADS}x1x{HEAD_SIZE}"
    report = rc.compare(tmp_path / "wrong.onnx", tmp_path / "m.onnx", opt_shapes=shapes)
    assert not report.met
    candidate = onnx_candidate(tmp_path / "m.onnx")
    inputs = {"input_ids": np.ones((1, 2), np.int64), "attention_mask": np.ones((1, 3), np.int64), **zeros(proto, WINDOW, 1)}
    with candidate.open() as run:
        rows = np.abs(run(inputs)["present.0.value"]).sum(axis=(0, 1, 3))
    assert (rows[:3] > 0).tolist() == [False, True, True], "the token before the step is a row of zeros here"
    assert not rows[3:].any()
