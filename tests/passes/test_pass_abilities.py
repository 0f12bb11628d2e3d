"""Optional abilities of the registered passes: which pass has which, and that a search space holds valid options only."""

from __future__ import annotations

import dataclasses
from typing import Any

import onnx_ir as ir
import pytest
from support.decoders import export

from ryzen_compile import registry
from ryzen_compile.errors import ModelError
from ryzen_compile.ir.load import load
from ryzen_compile.spec.pass_abilities import (
    Calibratable,
    Inspectable,
    KVCacheReference,
    StepWidthAdjustable,
    TorchEquivalent,
    Tunable,
)
from ryzen_compile.spec.passes import Change, Pass, PassContext
from ryzen_passes.fold import Fold
from ryzen_passes.kv.evict import KvEvict
from ryzen_passes.kv.static import KvStatic
from ryzen_passes.precision import ConvertPrecision

EVICT = KvEvict(score="knorm", sinks=2, recent_window=4)


@pytest.mark.parametrize(
    ("ability", "names"),
    [
        (Inspectable, {"kv-static"}),
        (Calibratable, {"kv-evict", "kv-quant"}),
        (StepWidthAdjustable, {"kv-static"}),
        (Tunable, {"kv-evict", "precision", "quantize-weights"}),
        (KVCacheReference, {"kv-static", "kv-evict", "kv-window", "kv-compact", "kv-select", "kv-quant"}),
        (TorchEquivalent, set()),
    ],
)
def test_a_pass_has_an_ability_if_its_class_defines_the_methods(ability: Any, names: set[str]) -> None:
    classes = [registry.find_pass(name) for name in registry.names("passes")]
    classes = [pass_class for pass_class in classes if pass_class.__module__.startswith("ryzen_passes.")]
    assert {pass_class.name for pass_class in classes if issubclass(pass_class, ability)} == names
    assert not isinstance(Fold(), ability)
    assert not issubclass(Pass, ability)


def static_model(architecture: str) -> ir.Model:
    model = load(export(architecture, "optimum-sdpa"))
    assert KvStatic(capacity=64, step=1).rewrite(model, PassContext(backend="onnxruntime"))
    return model


@pytest.mark.parametrize(
    ("evict", "fields"),
    [
        (EVICT, {"score", "budget", "pyramid"}),
        (dataclasses.replace(EVICT, score="keydiff"), {"score", "budget", "pyramid", "rescore_interval"}),
    ],
)
def test_kv_evict_accepts_every_value_of_its_search_space(evict: KvEvict, fields: set[str]) -> None:
    model, context = static_model("llama"), PassContext(backend="onnxruntime")
    space = evict.search_space(model, context)
    assert space.keys() == fields
    assert set(space["score"]) == {"knorm", "value-norm", "position", "keydiff"}, "no statistics for kvzap and triattention"
    for field, values in space.items():
        for value in values:
            candidate = dataclasses.replace(evict, **{field: value})
            assert isinstance(candidate.rewrite(model.clone(), context), Change), candidate


def test_the_search_space_of_kv_evict_follows_its_other_options() -> None:
    model, context = static_model("llama"), PassContext(backend="onnxruntime")
    assert KvEvict(score="knorm", sinks=4, recent_window=20).search_space(model, context)["budget"] == ("37.5%", "50%", "75%")
    assert KvEvict(score="knorm", sinks=4, recent_window=64).search_space(model, context) == {}, (
        "more protected tokens than slots"
    )
    with pytest.raises(ModelError, match="the caches grow"):
        EVICT.search_space(load(export("llama", "optimum-sdpa")), context)


@pytest.mark.parametrize(
    ("backend", "opset", "types"),
    [("tensorrt-rtx", 18, ("fp32", "fp16", "bf16")), ("tensorrt-rtx", 12, ("fp32", "fp16")), ("onnxruntime", 18, None)],
)
def test_precision_accepts_every_type_of_its_search_space(backend: str, opset: int, types: tuple[str, ...] | None) -> None:
    text = f"""<ir_version: 8, opset_import: ["" : {opset}]> g (float[N, 4] x) => (float[N, 4] y) <float[4, 4] w = {{
        {", ".join(map(str, range(16)))}}}> {{ y = MatMul(x, w) }}"""
    context = PassContext(backend=backend)
    space = ConvertPrecision(to="fp16").search_space(ir.from_onnx_text(text), context)
    assert space.get("to") == types
    for to in space.get("to", ()):
        assert isinstance(ConvertPrecision(to=to).rewrite(ir.from_onnx_text(text), context), Change)
