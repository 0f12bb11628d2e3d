"""Decoders of ONNX Runtime GenAI's builder with int4 weights, tied embeddings and caches of window size, under the kv passes.

The reference is the builder's graph itself, run step by step on ONNX Runtime.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.decoder_matrix import STACKS, STEPS, architectures
from support.decoders import GENAI_ARCHITECTURES, LAYERS, VOCABULARY
from support.genai_graphs import FP32, INT8, genai_graph, quantize_weights, set_window, source_logits, tie_embeddings
from support.step_runner import StepRunner

from ryzen_compile.ir.analysis.element_types import element_types
from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.ir.load import load
from ryzen_compile.spec.kv_cache import read_kv_cache_spec
from ryzen_compile.spec.passes import Change, Pass, PassContext, Refusal
from ryzen_passes.kv.quant import KvQuant
from ryzen_passes.kv.static import KvStatic
from ryzen_passes.legalize_msft import legalize_contrib_ops

Array = np.ndarray[Any, Any]
CONTEXT = PassContext(backend="onnxruntime")
HEAD_SIZE, CAPACITY, WINDOW = 16, 48, 9
WEIGHTS = 5 * LAYERS + 1
"""Matrix products by weights: QKV, output, gate, up and down of each layer, and the last layer."""


def rewritten(proto: onnx.ModelProto, folder: Path, *passes: Pass) -> ir.Model:
    onnx.save(proto, folder / "decoder.onnx")
    model = load(folder / "decoder.onnx")
    for pass_ in passes:
        outcome = pass_.rewrite(model, CONTEXT)
        assert isinstance(outcome, Change), outcome
    return model


def random_ids(tokens: int, batch: int = 2) -> Array:
    return np.random.default_rng(1).integers(0, VOCABULARY, (batch, tokens))


def single_steps(model: ir.Model, ids: Array) -> Array:
    return StepRunner(model, len(ids)).logits(ids, [1] * ids.shape[1])


def check_exact(actual: Array, expected: Array) -> None:
    assert actual.size == expected.size > 0
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stack", ["single-token", "single-token, decomposed", "evict", "window", "select", "compact"])
@pytest.mark.parametrize("architecture", architectures(*GENAI_ARCHITECTURES))
def test_256_steps_with_int4_weights_are_exact(architecture: str, stack: str, tmp_path: Path) -> None:
    proto = genai_graph(architecture)
    quantize_weights(proto, FP32)
    ids = random_ids(STEPS, batch=1)
    model = rewritten(proto, tmp_path, *STACKS[stack])
    assert sum(node.op_type == "MatMulNBits" for node in model.graph) == WEIGHTS
    check_exact(single_steps(model, ids), source_logits(proto, ids, HEAD_SIZE))


@pytest.mark.parametrize("architecture", GENAI_ARCHITECTURES)
def test_activations_in_int8_are_rounded_alike(architecture: str, tmp_path: Path) -> None:
    """ONNX Runtime rounds the activations to int8, so a difference of 1e-7 before the rounding may become one of a step."""
    proto = genai_graph(architecture)
    quantize_weights(proto, INT8)
    ids = random_ids(CAPACITY)
    actual = single_steps(rewritten(proto, tmp_path, KvStatic(capacity=CAPACITY, step=1)), ids)
    expected = source_logits(proto, ids, HEAD_SIZE)
    assert np.linalg.norm(actual - expected) <= 0.02 * np.linalg.norm(expected)


def test_caches_are_quantized_as_those_of_a_graph_with_dequantized_weights(tmp_path: Path) -> None:
    proto = genai_graph("llama")
    dense = quantize_weights(proto, FP32)
    ids = random_ids(CAPACITY)
    check_exact(source_logits(proto, ids, HEAD_SIZE), source_logits(dense, ids, HEAD_SIZE))
    passes = (KvStatic(capacity=CAPACITY, step=1), KvQuant(keys="8", values="8"))
    actual, expected = (single_steps(rewritten(graph, tmp_path, *passes), ids) for graph in (proto, dense))
    # A key or value at the middle between two of 256 levels may be rounded to either of them.
    assert np.linalg.norm(actual - expected) <= 1e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("quantized", [False, True])
def test_ids_of_tied_embeddings_are_recognized(quantized: bool, tmp_path: Path) -> None:
    proto = genai_graph("llama")
    if quantized:
        quantize_weights(proto, FP32)
    tie_embeddings(proto)
    ids = random_ids(CAPACITY)
    expected = source_logits(proto, ids, HEAD_SIZE)
    model = rewritten(proto, tmp_path)
    spec = interface_of(model).input("input_ids")
    assert (spec.role, spec.low, spec.high) == ("ids", 0, VOCABULARY - 1)
    assert isinstance(KvStatic(capacity=CAPACITY, step=1).rewrite(model, CONTEXT), Change)
    check_exact(single_steps(model, ids), expected)


@pytest.mark.parametrize("stack", ["single-token", "evict", "window", "compact"])
@pytest.mark.parametrize("layers", [[0], [1], [0, 1]])
def test_caches_of_window_size_keep_the_window(layers: list[int], stack: str, tmp_path: Path) -> None:
    proto = genai_graph("llama")
    for layer in layers:
        set_window(proto, layer, WINDOW)
    ids = random_ids(3 * WINDOW)
    expected = source_logits(proto, ids, HEAD_SIZE, WINDOW)
    assert np.abs(expected - source_logits(genai_graph("llama"), ids, HEAD_SIZE))[:, WINDOW:].max() > 0.1
    model = rewritten(proto, tmp_path, *STACKS[stack])
    spec = read_kv_cache_spec(model)
    assert spec is not None
    assert [layer.window for layer in spec.layers] == [WINDOW if layer in layers else None for layer in range(LAYERS)]
    check_exact(single_steps(model, ids), expected)


def test_tables_that_the_length_chooses_are_refused(tmp_path: Path) -> None:
    """The builder writes an If for longrope: from a length on, all tokens of a step are rotated by another table."""
    proto = genai_graph("llama")
    tables = {tensor.name: tensor for tensor in proto.graph.initializer if tensor.name in ("cos_cache", "sin_cache")}
    kept = [tensor for tensor in proto.graph.initializer if tensor.name not in tables]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    branches = {}
    for branch in ("then_branch", "else_branch"):
        nodes = [onnx.helper.make_node("Constant", [], [f"{branch}_{name}"], value=tensor) for name, tensor in tables.items()]
        outputs = [
            onnx.helper.make_tensor_value_info(f"{branch}_{name}", tensor.data_type, tensor.dims)
            for name, tensor in tables.items()
        ]
        branches[branch] = onnx.helper.make_graph(nodes, branch, [], outputs)
    limit = onnx.helper.make_node("Constant", [], ["limit"], value_ints=[64])
    shape = onnx.helper.make_node("Shape", ["attention_mask"], ["mask_dims"], start=1)
    greater = onnx.helper.make_node("Greater", ["mask_dims", "limit"], ["is_long"])
    choice = onnx.helper.make_node("If", ["is_long"], list(tables), name="choose", **branches)
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([limit, shape, greater, choice, *nodes])
    outcome = KvStatic(capacity=CAPACITY).rewrite(rewritten(proto, tmp_path), CONTEXT)
    assert isinstance(outcome, Refusal)
    assert "`choose` [If] chooses by the length (longrope)" in outcome.reason


def test_the_types_of_ops_with_quantized_weights_are_inferred(tmp_path: Path) -> None:
    proto = genai_graph("llama")
    quantize_weights(proto, FP32)
    tie_embeddings(proto)
    model = rewritten(proto, tmp_path)
    legalize_contrib_ops(model)
    types = element_types(model)
    nodes = [node for node in model.graph if node.op_type in ("MatMulNBits", "GatherBlockQuantized")]
    assert len(nodes) == WEIGHTS + 1
    assert {types[node.outputs[0]] for node in nodes} == {ir.DataType.FLOAT}
