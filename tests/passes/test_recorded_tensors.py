"""Tensors that the KV cache specification records: they survive other passes and files, and a missing one is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from support.decoders import VOCABULARY, export
from support.step_runner import StepRunner

from ryzen_compile.ir.fingerprint import fingerprint
from ryzen_compile.ir.load import load
from ryzen_compile.ir.save import save
from ryzen_compile.pipeline.parser import parse
from ryzen_compile.spec.kv_cache import (
    AppendEvictWrite,
    CircularWrite,
    GatherWrite,
    KVCacheSpec,
    ScatterWrite,
    SequentialWrite,
    read_kv_cache_spec,
    recorded_tensors,
    rename_tensors,
    write_kv_cache_spec,
)
from ryzen_compile.spec.passes import Change, PassContext, Refusal
from ryzen_passes.kv.quant import KvQuant
from ryzen_passes.kv.static.cache_view import read_static_cache_view
from ryzen_passes.properties import KV_STATIC

EVICT = "kv-evict{score=knorm,budget=24,sinks=2,recent-window=4}"
PYRAMID = "kv-evict{score=knorm,budget=24,sinks=2,recent-window=4,pyramid=2}"
STACKS = {
    "static, any step": ("kv-static{capacity=64}", "onnxruntime", SequentialWrite),
    "static, one token": ("kv-static{capacity=64,step=1}", "onnxruntime", SequentialWrite),
    "evict, any step": (f"kv-static{{capacity=64}},{EVICT}", "onnxruntime", AppendEvictWrite),
    "evict, one token": (f"kv-static{{capacity=64,step=1}},{EVICT}", "onnxruntime", ScatterWrite),
    "evict, one token, two sizes": (f"kv-static{{capacity=64,step=1}},{PYRAMID}", "onnxruntime", ScatterWrite),
    "evict, one token, plugin": (f"kv-static{{capacity=64,step=1}},{EVICT}", "tensorrt", AppendEvictWrite),
    "window, any step": ("kv-static{capacity=64},kv-window{sinks=0,window=24}", "onnxruntime", GatherWrite),
    "window, one token": ("kv-static{capacity=64,step=1},kv-window{sinks=0,window=24}", "onnxruntime", CircularWrite),
    "compact, one token": (
        "kv-static{capacity=64,step=1},kv-compact{budget=24,window=8,append-slots=8}",
        "onnxruntime",
        ScatterWrite,
    ),
}
"""Passes, the backend, and the write that they record."""
QUANT = "kv-quant{keys=8,values=4}"


def rewritten(model: ir.Model, passes: str, backend: str) -> ir.Model:
    for pass_ in parse(passes):
        assert isinstance(pass_.rewrite(model, PassContext(backend=backend)), Change), pass_
    return model


def spec_of(model: ir.Model) -> KVCacheSpec:
    spec = read_kv_cache_spec(model)
    assert spec is not None
    return spec


@pytest.mark.parametrize("stack", STACKS)
def test_quantization_finds_the_recorded_tensors_after_other_passes(stack: str, tmp_path: Path) -> None:
    """Folded before and after each pass, saved and loaded: the same logits and states as without."""
    passes, backend, write = STACKS[stack]
    source = export("llama", "optimum-sdpa")
    first, *rest = passes.split(",kv-", 1)
    folded = rewritten(load(source), ",fold,kv-".join([first, *rest]) + ",fold", backend)
    assert KV_STATIC.check(folded) is None
    assert {type(layer.policy.write) for layer in spec_of(folded).layers} == {write}
    save(folded, tmp_path / "folded.onnx")
    found = rewritten(load(tmp_path / "folded.onnx"), f"{QUANT},fold", backend)
    assert KV_STATIC.check(found) is None
    expected = rewritten(load(source), f"{passes},{QUANT}", backend)
    runners = [StepRunner(model, 2) for model in (found, expected)]
    ids = np.random.default_rng(3).integers(0, VOCABULARY, (2, 40))
    for size in [1] * 40 if "one token" in stack else [9, 1, 20, 10]:
        (step, ids) = (ids[:, :size], ids[:, size:])
        outputs, reference = (runner.step(step) for runner in runners)
        assert outputs.keys() == reference.keys()
        for name, array in outputs.items():
            np.testing.assert_allclose(array, reference[name], rtol=0, atol=1 if array.dtype == np.int8 else 1e-3, err_msg=name)


def test_folding_renames_a_recorded_tensor_that_it_replaces() -> None:
    """The layers of each size compute whether a token is written; folding keeps the first of these equal tensors."""
    passes, backend, _ = STACKS["evict, one token, two sizes"]
    model = rewritten(load(export("llama", "optimum-sdpa")), passes, backend)
    before = [layer.policy.write.is_written for layer in spec_of(model).layers]
    after = [layer.policy.write.is_written for layer in spec_of(rewritten(model, "fold", backend)).layers]
    assert before[0] != before[1]
    assert after == [before[0]] * 2


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("stack", STACKS)
def test_names_survive_the_passes_of_a_build(stack: str, backend: str) -> None:
    model = rewritten(load(export("llama", "optimum-sdpa")), STACKS[stack][0], backend)
    rewritten(model, "fold,precision{to=fp16}", backend)
    assert KV_STATIC.check(model) is None
    rewritten(model, "attention,fold", backend)
    names = {value.name for node in model.graph for value in node.outputs} | {value.name for value in model.graph.inputs}
    assert recorded_tensors(spec_of(model)) <= names


@pytest.mark.parametrize("field", ["slots", "is_written"])
def test_a_recorded_tensor_that_does_not_exist_is_refused(field: str) -> None:
    passes, backend, _ = STACKS["evict, one token"]
    model = rewritten(load(export("llama", "optimum-sdpa")), passes, backend)
    layer = spec_of(model).layers[1]
    name = getattr(layer.policy.write, field)
    assert name in recorded_tensors(spec_of(model))
    write_kv_cache_spec(model, rename_tensors(spec_of(model), {name: "absent"}))
    before = fingerprint(model)
    outcome = KvQuant(keys="4", values="4").rewrite(model, PassContext(backend=backend))
    assert isinstance(outcome, Refusal)
    # Both layers share `is_written`; the first one is reported.
    node = layer.attention_node if field == "slots" else spec_of(model).layers[0].attention_node
    reason = f"the cache specification of `{node}` records the tensor `absent`, which is missing from the graph"
    assert (outcome.reason, outcome.location) == (reason, node)
    assert KV_STATIC.check(model) == reason
    assert fingerprint(model) == before


def test_a_write_that_differs_from_its_record_is_refused() -> None:
    passes, backend, _ = STACKS["evict, any step"]
    model = rewritten(load(export("llama", "optimum-sdpa")), passes, backend)
    layer = read_static_cache_view(model).layers[0]
    node = layer.key.cache.producer()
    assert node is not None
    node.replace_input_with(list(node.inputs).index(layer.key.update), layer.value.update)
    outcome = KvQuant(keys="4", values="4").rewrite(model, PassContext(backend=backend))
    assert isinstance(outcome, Refusal)
    assert (outcome.reason, outcome.location) == (
        "the KVAppendEvict of the layer does not read this tensor",
        layer.key.update.name,
    )
