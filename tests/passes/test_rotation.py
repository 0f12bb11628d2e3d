"""Rotations: found in every spelling, against what the configuration says; what is none is told why."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.decoders import ARCHITECTURES, MAX_POSITIONS, VOCABULARY, case_params, export
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

SPELLINGS = [
    *((name, "optimum-sdpa") for name in ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "falcon", "gptj", "gpt-neox")),
    ("llama", "dynamo-21"),
    ("llama", "dynamo-23-bare"),
    ("llama", "genai"),
    ("llama", "genai-rotary"),
    ("gptj", "dynamo-23"),
]


def fixed(architecture: str, style: str, step: int = 0) -> StaticCacheView:
    model = load(export(architecture, style))
    assert isinstance(KvStatic(capacity=64, step=step).rewrite(model, PassContext(backend="onnxruntime")), Change)
    form = read_static_cache_view(model)
    assert isinstance(form, StaticCacheView)
    return form


def keys_of(form: StaticCacheView, at: int = -1) -> Rotation | str:
    layer = form.layers[at]
    return recognize_rotation(form, layer.key.update, layer.spec.kv_heads, layer.key.spec.head_size)


def found(form: StaticCacheView) -> Rotation:
    rotation = keys_of(form)
    assert isinstance(rotation, Rotation), rotation
    return rotation


def configured(architecture: str, size: int) -> tuple[Array, Array]:
    """Return the pairs (planes, 2) and frequencies (planes,) that the configuration asks for."""
    options = ARCHITECTURES[architecture][1]
    turning = options.get("rotary_dim", int(size * options.get("rope_parameters", {}).get("partial_rotary_factor", 1)))
    half = turning // 2
    pairs = np.arange(turning).reshape(half, 2) if architecture == "gptj" else np.arange(turning).reshape(2, half).T
    return pairs, 10000.0 ** -(2 * np.arange(half) / turning)


@pytest.mark.parametrize(("architecture", "style"), case_params(SPELLINGS))
@pytest.mark.parametrize("step", [0, 1])
def test_pairs_and_frequencies_are_those_of_the_configuration(architecture: str, style: str, step: int) -> None:
    form = fixed(architecture, style, step)
    size = form.layers[0].key.spec.head_size
    pairs, frequency = configured(architecture, size)
    for at in range(len(form.layers)):
        rotation = keys_of(form, at)
        assert isinstance(rotation, Rotation), rotation
        assert rotation.pairs.tolist() == pairs.tolist()
        np.testing.assert_allclose(rotation.frequency, frequency, rtol=1e-6, atol=1e-10)
        np.testing.assert_allclose(rotation.scale, np.ones(size), rtol=1e-6, atol=0)
        assert rotation.max_positions == (MAX_POSITIONS if architecture == "gptj" or "genai" in style else None)


@pytest.mark.parametrize(("architecture", "style"), [("llama", "optimum-sdpa"), ("gptj", "optimum-sdpa"), ("llama", "genai")])
def test_what_is_named_as_unturned_becomes_the_key(architecture: str, style: str) -> None:
    form = fixed(architecture, style)
    rotation, key, interface = found(form), form.layers[-1].key, interface_of(form.model)
    form.model.graph.outputs.extend([rotation.unrotated_keys, key.update])
    stepper, random = StepRunner(form.model, 2, interface), np.random.default_rng(0)
    for _ in range(3):
        before = stepper.states["past_length"]
        outputs = stepper.step(random.integers(0, VOCABULARY, (2, 7)))
        pre = outputs[rotation.unrotated_keys.name or ""].transpose(np.argsort(rotation.layout))
        moved = rotation.rotate(pre, (before[:, None] + np.arange(7))[:, None])
        np.testing.assert_allclose(outputs[key.update.name or ""], moved, rtol=0, atol=1e-5)
        assert np.abs(moved - pre).max() > 0.1


def test_queries_turn_as_keys_do() -> None:
    form = fixed("llama", "optimum-sdpa")
    layer = form.layers[0]
    query = layer.attention.inputs[0]
    assert query is not None
    rotation = recognize_rotation(form, query, layer.spec.heads, layer.key.spec.head_size)
    assert isinstance(rotation, Rotation), rotation
    assert rotation.same_as(found(form))


@pytest.mark.parametrize("architecture", ["llama", "gptj", "phi3"])
def test_a_graph_turns_by_as_much_as_it_is_told(architecture: str) -> None:
    form = fixed(architecture, "optimum-sdpa")
    rotation, size = found(form), form.layers[0].key.spec.head_size
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[B, H, N, {size}] keys, int64[B, 1, N] by) => (float[B, H, N, {size}] out) {{ [last] out = Identity (keys) }}"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    write, last = NodeBuilder(model.graph, ModelInfo(model)), next(iter(model.graph))
    keys, by = model.graph.inputs
    turned = rotation.write_rotation(write, last, keys, rotation.write_cos_sin(write, last, by, ir.DataType.FLOAT))
    last.replace_input_with(0, turned)
    random = np.random.default_rng(1)
    plain, at, more = (
        random.normal(size=(2, 3, 5, size)),
        random.integers(0, 500, (2, 1, 5)),
        random.integers(0, 500, (2, 1, 5)),
    )
    feed = {"keys": rotation.rotate(plain, at).astype(np.float32), "by": more}
    pairs, frequency = configured(architecture, size)
    wanted = plain.copy()
    whole = (plain[..., pairs[:, 0]] + 1j * plain[..., pairs[:, 1]]) * np.exp(1j * (at + more)[..., None] * frequency)
    wanted[..., pairs[:, 0]], wanted[..., pairs[:, 1]] = whole.real, whole.imag
    np.testing.assert_allclose(run_unoptimized(ir.to_proto(model).SerializeToString(), feed), wanted, rtol=0, atol=1e-3)


def between(form: StaticCacheView, value: ir.Value, op: str, *others: Array) -> None:
    """Put `op` over `value` and `others` between `value` and what reads it."""
    constants = [ir.Value(name=f"c{at}_{value.name}", const_value=ir.tensor(other)) for at, other in enumerate(others)]
    for constant in constants:
        form.model.graph.register_initializer(constant)
    node = ir.node(op, [value, *constants], name=f"{op}_{value.name}")
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = f"{op}_of_{value.name}", value.type, value.shape
    value.replace_all_uses_with(node.outputs[0])
    node.replace_input_with(0, value)
    producer = value.producer()
    assert producer is not None
    form.model.graph.insert_after(producer, node)


def test_scaled_angles_are_a_rotation_and_a_scale() -> None:
    form = fixed("phi3", "optimum-sdpa")
    for node in [node for node in form.model.graph if node.op_type in ("Cos", "Sin")]:
        between(form, node.outputs[0], "Mul", np.array(1.25, np.float32))
    rotation = found(form)
    pairs, frequency = configured("phi3", 16)
    assert rotation.pairs.tolist() == pairs.tolist()
    np.testing.assert_allclose(rotation.frequency, frequency, rtol=1e-6)
    np.testing.assert_allclose(rotation.scale, np.where(np.arange(16) < 8, 1.25, 1), rtol=1e-6)


@pytest.mark.parametrize(
    ("op", "other", "says"),
    [
        ("Min", np.array(300), "it turns keys otherwise than"),
        ("Min", np.array(100_000), "by 262144 positions it turns keys otherwise"),
        ("Add", np.array(1), "at position 0 it leaves no key where it was"),
        ("Mul", np.array(0), "it turns nothing"),
    ],
)
def test_what_does_not_turn_evenly_is_no_rotation(op: str, other: Array, says: str) -> None:
    form = fixed("llama", "optimum-sdpa")
    between(form, form.positions, op, other.astype(np.int64))
    told = keys_of(form)
    assert isinstance(told, str), told
    assert says in told


def test_learned_positions_are_no_rotation() -> None:
    assert "by a rotation" in str(keys_of(fixed("gpt2", "optimum-sdpa")))
