"""The pass `drop-layers`: blocks are removed with their caches, listed or by their influence."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from support import decoders, encoders
from support.ort_session import run_as_written

import ryzen_compile as rc
from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.ir.load import load
from ryzen_compile.ir.save import save
from ryzen_compile.pipeline.activation_statistics import mean_cosines
from ryzen_compile.spec.fidelity import Lossy
from ryzen_compile.spec.passes import Change, PassContext, Refusal
from ryzen_passes.drop_layers import DropLayers
from ryzen_passes.fold import Fold
from ryzen_passes.kv.static import KvStatic

CONTEXT = PassContext(backend="onnxruntime")
BLOCKS = {
    "bert": "inner.encoder.layer",
    "vit": "inner.layers",
    "clip": "inner.encoder.layers",
    "whisper": "inner.layers",
}
"""The path of the blocks of an encoder in its module."""


def load_folded(path: Path) -> ir.Model:
    model = load(path)
    Fold().rewrite(model, CONTEXT)
    return model


def without_blocks(name: str, layers: tuple[int, ...]) -> torch.nn.Module:
    module = copy.deepcopy(encoders.module(name, "sdpa"))
    path, _, attribute = BLOCKS[name].rpartition(".")
    parent: Any = module.get_submodule(path)
    kept = [block for index, block in enumerate(getattr(parent, attribute)) if index not in layers]
    setattr(parent, attribute, torch.nn.ModuleList(kept))
    return module


@pytest.mark.parametrize("layers", [(1,), (0, 2)], ids=str)
@pytest.mark.parametrize("style", ["tracer-17-sdpa", pytest.param("dynamo-23", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("name", list(BLOCKS))
def test_an_encoder_computes_what_the_module_without_the_blocks_computes(
    name: str, style: str, layers: tuple[int, ...]
) -> None:
    model = load_folded(encoders.export(name, style))
    inputs = encoders.inputs(name)
    estimate = DropLayers(layers=layers).estimate(model, CONTEXT)
    before = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    change = DropLayers(layers=layers).rewrite(model, CONTEXT)
    assert isinstance(change, Change)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    arrays = {key: value.numpy() for key, value in inputs.items()}
    (output,) = run_as_written(model, arrays)
    with torch.inference_mode():
        expected = without_blocks(name, layers)(*inputs.values())
    np.testing.assert_allclose(output, expected.numpy(), rtol=1e-3, atol=1e-4)
    after = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    assert not isinstance(estimate, Refusal)
    assert -estimate.weight_bytes == before - after > 0


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_a_block_of_a_decoder_is_removed_with_its_caches(architecture: str) -> None:
    model = load_folded(decoders.export(architecture, "dynamo-23"))
    assert isinstance(DropLayers(layers=(0,)).rewrite(model, CONTEXT), Change)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    names = {value.name for value in (*model.graph.inputs, *model.graph.outputs)}
    first, second = (f".{layer}." for layer in range(2))
    assert not any(first in str(name) for name in names)
    assert sum(second in str(name) for name in names) == 4
    interface = interface_of(model)
    assert {spec.name for spec in (*interface.inputs, *interface.outputs)} == names
    assert not any(first in state.input for state in interface.states)


def test_a_decoder_that_loses_caches_is_refused_by_a_build(tmp_path: Path) -> None:
    with pytest.raises(rc.PipelineError, match="from the inputs and outputs") as caught:
        rc.build(
            decoders.export("llama", "dynamo-23"),
            gpu="cpu",
            passes="fold,drop-layers{layers=[0]}",
            output=tmp_path / "p.ryzen",
            compare=False,
            cache=False,
        )
    assert "rewrite" in str(caught.value.hint)


def test_the_blocks_with_the_least_influence_are_removed() -> None:
    model = load_folded(encoders.export("bert", "tracer-17-sdpa"))
    sample = {key: value.numpy() for key, value in encoders.inputs("bert").items()}
    measured = []

    def measure(*arguments: Any) -> list[float]:
        measured.extend(mean_cosines(*arguments))
        return [0.99, 0.2, 0.7, 0.98]  # the first and the last block are kept although they have the least influence

    context = PassContext(backend="onnxruntime", samples=[sample], measure_cosines=measure)
    change = DropLayers(count=1).rewrite(model, context)
    assert isinstance(change, Change)
    assert change.summary == "removed the blocks 2 of 4"
    assert change.notes[2] == "block 2: influence 0.300"
    assert all(0 < cosine < 1 for cosine in measured)


def test_a_decoder_computes_what_the_module_without_the_block_computes() -> None:
    model = load_folded(decoders.export("llama", "prefill-23"))
    assert isinstance(DropLayers(layers=(0,)).rewrite(model, CONTEXT), Change)
    ids = np.random.default_rng(0).integers(2, 90, (1, 7))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    (logits,) = run_as_written(model, {value.name: inputs[value.name] for value in model.graph.inputs})
    module = copy.deepcopy(decoders.module("llama"))
    module.model.layers = module.model.layers[1:]
    with torch.inference_mode():
        expected = module(torch.from_numpy(ids), use_cache=False).logits
    np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-3, atol=1e-4)


def test_caches_that_a_kv_pass_recorded_are_refused() -> None:
    model = load_folded(decoders.export("llama", "optimum-sdpa"))
    assert isinstance(KvStatic(capacity=64).rewrite(model, CONTEXT), Change)
    refusal = DropLayers(layers=(0,)).rewrite(model, CONTEXT)
    assert isinstance(refusal, Refusal)
    assert refusal.hint == "run drop-layers before kv-static"


def test_the_mean_cosine_leaves_out_padding(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 17]> g (float[N,S,4] x, float[N,S,4] y, int64[N,S] mask) => (float[N,S,4] z)
      { a = Neg (x)  b = Abs (y)  m = Cast <to=1> (mask)  z = Add (a, b) }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    save(model, tmp_path / "m.onnx")
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((2, 3, 4)).astype(np.float32) for _ in range(2))
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    specs = interface_of(model)
    roles = {"mask": ("mask", 0)}
    inputs = tuple(
        msgspec.structs.replace(spec, role=roles[spec.name][0], padding_value=roles[spec.name][1])
        if spec.name in roles
        else spec
        for spec in specs.inputs
    )
    interface = msgspec.structs.replace(specs, inputs=inputs)
    sample = {"x": x, "y": y, "mask": mask}
    (measured,) = mean_cosines(model, [("a", "b")], [sample, sample], interface=interface)
    a, b = -x[mask > 0], np.abs(y[mask > 0])
    cosines = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert measured == pytest.approx(cosines.mean(), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "neither"),
        ({"layers": (4,)}, "no block 4: the model has 4"),
        ({"layers": (0, 1, 2, 3)}, "too many"),
        ({"count": 3}, "too many"),
        ({"count": 1}, "there are no samples"),
    ],
)
def test_what_cannot_be_dropped_is_refused(options: dict[str, Any], reason: str) -> None:
    model = load_folded(encoders.export("bert", "dynamo-23"))
    refusal = DropLayers(**options).rewrite(model, CONTEXT)
    assert isinstance(refusal, Refusal)
    assert reason in refusal.reason


def test_a_graph_without_blocks_is_refused() -> None:
    model = ir.from_proto(
        onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 17]> g (float[N] x) => (float[N] y) {y = Abs (x)}')
    )
    refusal = DropLayers(count=1).rewrite(model, CONTEXT)
    assert isinstance(refusal, Refusal)
    assert "no blocks" in refusal.reason


@pytest.mark.parametrize(
    "options", [{"layers": (1,), "count": 1}, {"layers": (1, 1)}, {"count": -1}, {"count": 1, "floor": 2.0}]
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"at least 0|twice|either|cosine"):
        DropLayers(**options)


def test_the_floor_is_declared() -> None:
    assert DropLayers(count=1, floor=0.7).fidelity == Lossy("cosine", 0.7)
