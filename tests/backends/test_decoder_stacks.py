"""Decoders with fixed-size caches built in fp16 by TensorRT-RTX for all architectures: fused attention, float16 caches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from support.decoders import LAYERS, VOCABULARY, export

import ryzen_compile as rc
from ryzen_compile.artifacts.package.manifest import Manifest, VariantRecord
from ryzen_compile.builder.rewrite import RewriteConfig, rewrite, rewrite_steps
from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.ir.load import load
from ryzen_compile.spec.kv_cache import read_kv_cache_spec

TARGETS = ("sm86", "sm89", "sm120")
STRICT = "fold,attention{strict=true}"
STATIC, EVICT = "kv-static{capacity=64}", "kv-static{capacity=64},kv-evict{score=knorm,budget=25%,sinks=2,recent-window=4}"
CACHES = [f"past_key_values.{layer}.{kind}" for layer in range(LAYERS) for kind in ("key", "value")]
OTHER_STATES = {STATIC: ["length"], EVICT: ["length", "score", "position"]}


@pytest.mark.parametrize(
    ("architecture", "passes"),
    [
        ("llama", STATIC),
        ("llama", EVICT),
        pytest.param("mistral", STATIC, marks=pytest.mark.exhaustive),
        pytest.param("mistral", EVICT, marks=pytest.mark.exhaustive),
        ("bloom", STATIC),
    ],
)
def test_every_stack_builds_with_fused_attention_and_float16_caches(architecture: str, passes: str, tmp_path: Path) -> None:
    rewrite_steps(export(architecture, "optimum-sdpa"), tmp_path / "decode", RewriteConfig(passes=passes), (1, 16, 0))
    package = rc.build(tmp_path / "decode", gpu=",".join(TARGETS), precision="fp16", passes=STRICT, compare=False, cache=False)
    manifest = package.manifest
    assert not manifest.refused_targets
    assert [graph.name for graph in manifest.graphs] == ["step-1", "step-16", "step-any"]
    assert {(engine.graph, str(target)) for engine in manifest.engines for target in engine.targets} == {
        (graph.name, target) for graph in manifest.graphs for target in TARGETS
    }
    for engine in manifest.engines:
        assert engine.layers is not None
        assert [attention.fused for attention in engine.layers.attentions] == [True] * LAYERS
    for graph in manifest.graphs:
        assert {state.name for state in graph.interface.states} == {*CACHES, *OTHER_STATES[passes]}
        (variant,) = (variant for variant in graph.variants if not variant.portable)
        assert portable_variant(manifest).state_dtypes == {}
        assert variant.state_dtypes == dict.fromkeys(CACHES, "float16")
        # A step of several tokens writes ring buffers to separate output buffers.
        is_ring_of_tokens = architecture == "mistral" and graph.name != "step-1"
        check_states(load(package.path / variant.path), in_place=passes == STATIC and not is_ring_of_tokens)


STATES_BY_PASSES = {
    "kv-evict{score=keydiff,budget=24,sinks=2,recent-window=4,rescore-interval=4}": {"score", "position", "anchor"},
    "kv-evict{score=knorm,budget=24,sinks=2,recent-window=4,pyramid=2}": {"score.0", "position.0", "score.1", "position.1"},
    "kv-window{sinks=2,window=22}": {"sinks.0"},
    "kv-select{page-size=8,selected-pages=3}": {"low.0", "high.1"},
    "kv-compact{budget=24,window=8,append-slots=8}": {"score", "position"},
    "kv-quant": {"past_key_values.0.key.scale"},
    "kv-evict{score=knorm,budget=24,sinks=2,recent-window=4},kv-quant{keys=8,values=4}": {
        "score",
        "past_key_values.1.value.scale",
    },
}
"""Passes that follow kv-static, and some of the states that they add."""


@pytest.mark.slow
@pytest.mark.parametrize("passes", STATES_BY_PASSES)
def test_every_other_stack_keeps_attention_fused(passes: str, tmp_path: Path) -> None:
    config = RewriteConfig(passes=f"kv-static{{capacity=64}},{passes}")
    rewrite_steps(export("llama", "optimum-sdpa"), tmp_path / "decode", config, (1, 0))
    package = rc.build(tmp_path / "decode", gpu=",".join(TARGETS), precision="fp16", passes=STRICT, compare=False, cache=False)
    manifest = package.manifest
    assert not manifest.refused_targets
    assert {str(target) for engine in manifest.engines for target in engine.targets} == set(TARGETS)
    for engine in manifest.engines:
        assert engine.layers is not None
        assert [attention.fused for attention in engine.layers.attentions] == [True] * LAYERS, engine.path
    for graph in manifest.graphs:
        assert STATES_BY_PASSES[passes] | {"length"} <= {state.name for state in graph.interface.states}


def check_states(model: ir.Model, *, in_place: bool) -> None:
    """Assert that caches are float16 at the input, the update and the output, and that other states keep their types."""
    interface, states = interface_of(model), {state.name: state for state in interface_of(model).states}
    inputs = {value.name: value for value in model.graph.inputs}
    outputs = {value.name: value for value in model.graph.outputs}
    for name, state in states.items():
        dtypes = {"length": ir.DataType.INT64, "position": ir.DataType.INT32, "score": ir.DataType.FLOAT}
        dtype = dtypes.get(name, ir.DataType.FLOAT16)
        assert inputs[state.input].dtype == outputs[state.output].dtype == dtype
        assert interface.input(state.input).role == "state"
        assert not [node for node in inputs[state.input].consumers() if node.op_type == "Cast" and name in CACHES]
        producer = outputs[state.output].producer()
        if in_place and name in CACHES:
            assert state.in_place
            # TensorRT imports TensorScatter as KVCacheUpdate if the cache is a network input and the result a network output.
            assert producer is not None
            assert (producer.op_type, producer.inputs[0]) == ("TensorScatter", inputs[state.input])
    caches = read_kv_cache_spec(model)
    assert caches is not None
    assert {tensor.dtype for layer in caches.layers for tensor in (layer.key, layer.value)} == {"float16"}
    assert outputs["logits"].dtype == ir.DataType.FLOAT


def portable_variant(manifest: Manifest) -> VariantRecord:
    return next(variant for graph in manifest.graphs for variant in graph.variants if variant.portable)


@pytest.mark.parametrize("passes", [STATIC, EVICT])
def test_float16_caches_are_float32_in_the_portable_variant(passes: str, tmp_path: Path) -> None:
    model, logits = export("llama", "optimum-sdpa"), []
    for name, precision in (("fp32", ""), ("fp16", ",precision{to=fp16}")):
        rewrite(model, tmp_path / f"{name}.onnx", RewriteConfig(passes=passes + precision, backend="tensorrt-rtx"))
        package = rc.build(tmp_path / f"{name}.onnx", gpu="cpu", compare=False, cache=False)
        graph = package.manifest.graphs[0]
        dtypes = {state.name: graph.interface.input(state.input).dtype for state in graph.interface.states}
        half_states = [state for state, dtype in dtypes.items() if dtype == "float16"]
        assert sorted(half_states) == (sorted(CACHES) if name == "fp16" else [])
        assert portable_variant(package.manifest).state_dtypes == dict.fromkeys(half_states, "float32")
        with rc.load(package.path) as engine, engine.session() as session:
            assert session.read_state(CACHES[0]).dtype == np.float32
            assert engine.interface.input(CACHES[0]).dtype == "float32"
            casts = [
                node for node in load(package.path / portable_variant(package.manifest).path).graph if node.op_type == "Cast"
            ]
            assert not [node for node in casts if node.inputs[0] is not None and node.inputs[0].name in CACHES]
            logits.append(session.step(np.arange(20)[None] % VOCABULARY)[0, :, :5])
    np.testing.assert_allclose(logits[0], logits[1], rtol=0, atol=0.05)
    assert not np.array_equal(logits[0], logits[1]), "the weights were rounded to fp16"


def test_caches_that_the_precision_pass_keeps_in_fp32_stay_fp32(tmp_path: Path) -> None:
    passes = f"{STATIC},precision{{to=fp16,keep=[TensorScatter]}}"
    rewrite(export("llama", "optimum-sdpa"), tmp_path / "m.onnx", RewriteConfig(passes=passes, backend="tensorrt-rtx"))
    interface = interface_of(load(tmp_path / "m.onnx"))
    assert {interface.input(name).dtype for name in CACHES} == {"float32"}
    assert {spec.dtype for spec in interface.outputs if spec.name.startswith("present.")} == {"float32"}
