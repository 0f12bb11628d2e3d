"""Rotation recognition: every exporter's RoPE matches the model configuration; other position encodings give a reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.decoder_matrix import exports
from support.decoders import ARCHITECTURES, MAX_POSITIONS, VOCABULARY, export
from support.step_runner import StepRunner

from ryzen_compile.backends.onnxruntime.backend import run_unoptimized
from ryzen_compile.ir.edit.builder import ModelInfo, NodeBuilder
from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.ir.load import load
from ryzen_compile.spec.passes import Change, PassContext
from ryzen_passes.kv.recognition.rotation import Rotation, recognize_rotation
from ryzen_passes.kv.static import KvStatic
from ryzen_passes.kv.static.cache_view import StaticCacheView, read_static_cache_view

Array = np.ndarray[Any, Any]

ROPE_EXPORTS = [
    *((name, "optimum-sdpa") for name in ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "falcon", "gptj", "gpt-neox")),
    ("llama", "dynamo-21"),
    ("llama", "dynamo-23-bare"),
    ("llama", "genai"),
    ("llama", "genai-rotary"),
    ("gptj", "dynamo-23"),
]


def static_view(architecture: str, style: str, step: int = 0) -> StaticCacheView:
    model = load(export(architecture, style))
    assert isinstance(KvStatic(capacity=64, step=step).rewrite(model, PassContext(backend="onnxruntime")), Change)
    return read_static_cache_view(model)


def key_rotation(view: StaticCacheView, at: int = -1) -> Rotation | str:
    layer = view.layers[at]
    return recognize_rotation(view, layer.key.update, layer.spec.kv_heads, layer.key.spec.head_size)


def checked_rotation(view: StaticCacheView) -> Rotation:
    rotation = key_rotation(view)
    assert isinstance(rotation, Rotation), rotation
    return rotation


def expected_rotation(architecture: str, size: int) -> tuple[Array, Array]:
    """Return the pairs (planes, 2) and frequencies (planes,) of the model configuration."""
    options = ARCHITECTURES[architecture][1]
    rotary_size = options.get("rotary_dim", int(size * options.get("rope_parameters", {}).get("partial_rotary_factor", 1)))
    half = rotary_size // 2
    pairs = np.arange(rotary_size).reshape(half, 2) if architecture == "gptj" else np.arange(rotary_size).reshape(2, half).T
    return pairs, 10000.0 ** -(2 * np.arange(half) / rotary_size)


@pytest.mark.parametrize(("architecture", "style"), exports(ROPE_EXPORTS))
@pytest.mark.parametrize("step", [0, 1])
def test_pairs_and_frequencies_match_the_configuration(architecture: str, style: str, step: int) -> None:
    view = static_view(architecture, style, step)
    size = view.layers[0].key.spec.head_size
    pairs, frequency = expected_rotation(architecture, size)
    for at in range(len(view.layers)):
        rotation = key_rotation(view, at)
        assert isinstance(rotation, Rotation), rotation
        assert rotation.pairs.tolist() == pairs.tolist()
        np.testing.assert_allclose(rotation.frequency, frequency, rtol=1e-6, atol=1e-10)
        np.testing.assert_allclose(rotation.scale, np.ones(size), rtol=1e-6, atol=0)
        assert rotation.max_positions == (MAX_POSITIONS if architecture == "gptj" or "genai" in style else None)


@pytest.mark.parametrize(("architecture", "style"), [("llama", "optimum-sdpa"), ("gptj", "optimum-sdpa"), ("llama", "genai")])
def test_rotating_the_unrotated_keys_gives_the_keys(architecture: str, style: str) -> None:
    view = static_view(architecture, style)
    rotation, key, interface = checked_rotation(view), view.layers[-1].key, interface_of(view.model)
    view.model.graph.outputs.extend([rotation.unrotated_keys, key.update])
    stepper, random = StepRunner(view.model, 2, interface), np.random.default_rng(0)
    for _ in range(3):
        before = stepper.states["past_length"]
        outputs = stepper.step(random.integers(0, VOCABULARY, (2, 7)))
        unrotated = outputs[rotation.unrotated_keys.name or ""].transpose(np.argsort(rotation.layout))
        rotated = rotation.rotate(unrotated, (before[:, None] + np.arange(7))[:, None])
        np.testing.assert_allclose(outputs[key.update.name or ""], rotated, rtol=0, atol=1e-5)
        assert np.abs(rotated - unrotated).max() > 0.1


def test_queries_have_the_rotation_of_the_keys() -> None:
    view = static_view("llama", "optimum-sdpa")
    layer = view.layers[0]
    query = layer.attention.inputs[0]
    assert query is not None
    rotation = recognize_rotation(view, query, layer.spec.heads, layer.key.spec.head_size)
    assert isinstance(rotation, Rotation), rotation
    assert rotation.same_as(checked_rotation(view))


@pytest.mark.parametrize("architecture", ["llama", "gptj", "phi3"])
def test_written_nodes_rotate_keys_further(architecture: str) -> None:
    view = static_view(architecture, "optimum-sdpa")
    rotation, size = checked_rotation(view), view.layers[0].key.spec.head_size
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[B, H, N, {size}] keys, int64[B, 1, N] by) => (float[B, H, N, {size}] out) {{ [last] out = Identity (keys) }}"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    writer, last = NodeBuilder(model.graph, ModelInfo(model)), next(iter(model.graph))
    keys, by = model.graph.inputs
    rotated = rotation.write_rotation(writer, last, keys, rotation.write_cos_sin(writer, last, by, ir.DataType.FLOAT))
    last.replace_input_with(0, rotated)
    random = np.random.default_rng(1)
    vectors, first, further = (
        random.normal(size=(2, 3, 5, size)),
        random.integers(0, 500, (2, 1, 5)),
        random.integers(0, 500, (2, 1, 5)),
    )
    inputs = {"keys": rotation.rotate(vectors, first).astype(np.float32), "by": further}
    pairs, frequency = expected_rotation(architecture, size)
    expected = vectors.copy()
    planes = (vectors[..., pairs[:, 0]] + 1j * vectors[..., pairs[:, 1]]) * np.exp(
        1j * (first + further)[..., None] * frequency
    )
    expected[..., pairs[:, 0]], expected[..., pairs[:, 1]] = planes.real, planes.imag
    np.testing.assert_allclose(run_unoptimized(ir.to_proto(model).SerializeToString(), inputs), expected, rtol=0, atol=1e-3)


def insert_after(view: StaticCacheView, value: ir.Value, op: str, *others: Array) -> None:
    """Insert `op` on `value` and the constants `others` between `value` and its consumers."""
    constants = [ir.Value(name=f"c{index}_{value.name}", const_value=ir.tensor(other)) for index, other in enumerate(others)]
    for constant in constants:
        view.model.graph.register_initializer(constant)
    node = ir.node(op, [value, *constants], name=f"{op}_{value.name}")
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = f"{op}_of_{value.name}", value.type, value.shape
    value.replace_all_uses_with(node.outputs[0])
    node.replace_input_with(0, value)
    producer = value.producer()
    assert producer is not None
    view.model.graph.insert_after(producer, node)


def test_scaled_cosines_and_sines_give_a_scale() -> None:
    view = static_view("phi3", "optimum-sdpa")
    for node in [node for node in view.model.graph if node.op_type in ("Cos", "Sin")]:
        insert_after(view, node.outputs[0], "Mul", np.array(1.25, np.float32))
    rotation = checked_rotation(view)
    pairs, frequency = expected_rotation("phi3", 16)
    assert rotation.pairs.tolist() == pairs.tolist()
    np.testing.assert_allclose(rotation.frequency, frequency, rtol=1e-6)
    np.testing.assert_allclose(rotation.scale, np.where(np.arange(16) < 8, 1.25, 1), rtol=1e-6)


@pytest.mark.parametrize(
    ("op", "other", "message"),
    [
        ("Min", np.array(300), "the RoPE frequency is not constant: offset"),
        ("Min", np.array(100_000), "the RoPE frequency is not constant: offset 262144 differs from 262144 offsets of 1"),
        ("Add", np.array(1), "keys at position 0 are not a scaled copy of the unrotated keys"),
        ("Mul", np.array(0), "no element is rotated"),
    ],
)
def test_frequencies_that_are_not_constant_are_no_rotation(op: str, other: Array, message: str) -> None:
    view = static_view("llama", "optimum-sdpa")
    insert_after(view, view.positions, op, other.astype(np.int64))
    reason = key_rotation(view)
    assert isinstance(reason, str), reason
    assert message in reason


def test_learned_positions_are_no_rotation() -> None:
    assert "by a rotation" in str(key_rotation(static_view("gpt2", "optimum-sdpa")))
