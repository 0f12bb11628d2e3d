"""Tests of the KV cache specification in the metadata of a model: metadata that cannot be read is refused, not ignored."""

from __future__ import annotations

import json

import onnx
import onnx_ir as ir
import pytest

from ryzen_compile.errors import ModelError
from ryzen_compile.spec.kv_cache import (
    METADATA_KEY,
    CacheTensorSpec,
    KVCacheSpec,
    LayerCacheSpec,
    read_kv_cache_spec,
    write_kv_cache_spec,
)
from ryzen_compile.spec.properties import Property
from ryzen_passes.properties import KV_DENSE, KV_STATIC, KV_UNQUANTIZED

TENSOR = CacheTensorSpec(state="k", update="k_new", cache="k_all", head_size=4, dtype="float32")
SPEC = KVCacheSpec(
    layers=(LayerCacheSpec(attention_node="a", heads=2, kv_heads=1, key=TENSOR, value=TENSOR, window=None),),
    position_encoding="rope",
    max_positions=None,
    padding=True,
)


def _model() -> ir.Model:
    text = '<ir_version: 10, opset_import: ["" : 21]> g (float[N] x) => (float[N] y) { y = Identity (x) }'
    return ir.serde.deserialize_model(onnx.parser.parse_model(text))


def test_written_specification_is_read_with_its_version() -> None:
    model = _model()
    assert read_kv_cache_spec(model) is None
    write_kv_cache_spec(model, SPEC)
    assert read_kv_cache_spec(model) == SPEC
    assert json.loads(model.metadata_props[METADATA_KEY])["schema_version"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 1}, "has schema version 1, but this ryzen-compile supports only version 2"),
        ({"schema_version": 3}, "has schema version 3, but this ryzen-compile supports only version 2"),
        ({"schema_version": None}, "cannot be decoded: Expected `int`, got `null`"),
        ({"layers": [{}]}, r"cannot be decoded: Object missing required field `attention_node` - at `\$.layers\[0\]`"),
        ({"novelty": 1}, "cannot be decoded: Object contains unknown field `novelty`"),
    ],
)
@pytest.mark.parametrize("property_", [KV_STATIC, KV_DENSE, KV_UNQUANTIZED], ids=lambda property_: property_.name)
def test_specification_that_cannot_be_read_is_refused(changes: dict[str, object], message: str, property_: Property) -> None:
    model = _model()
    write_kv_cache_spec(model, SPEC)
    model.metadata_props[METADATA_KEY] = json.dumps(json.loads(model.metadata_props[METADATA_KEY]) | changes)
    with pytest.raises(ModelError, match=f"the model's metadata `ryzen_compile.kv` {message}") as caught:
        read_kv_cache_spec(model)
    assert "export or rewrite the model again" in (caught.value.hint or "")
    with pytest.raises(ModelError, match="the model's metadata `ryzen_compile.kv`"):
        property_.check(model)


def test_specification_without_schema_version_is_refused() -> None:
    model = _model()
    write_kv_cache_spec(model, SPEC)
    fields = json.loads(model.metadata_props[METADATA_KEY])
    del fields["schema_version"]
    model.metadata_props[METADATA_KEY] = json.dumps(fields)
    with pytest.raises(ModelError, match="`ryzen_compile.kv` has no schema version"):
        read_kv_cache_spec(model)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"type": "growing", "slots": 8}, "unknown field `slots`"),
        ({"type": "static", "slots": 8, "score": "knorm"}, "unknown field `score`"),
        ({"type": "static"}, "missing required field `slots`"),
        ({"type": "eviction", "slots": 8, "score": "knorm", "sinks": 0}, "missing required field `recent_window`"),
        ({"type": "pinning", "slots": 8}, "Invalid value 'pinning'"),
    ],
)
def test_a_policy_holds_the_fields_of_its_kind_only(policy: dict[str, object], message: str) -> None:
    model = _model()
    write_kv_cache_spec(model, SPEC)
    fields = json.loads(model.metadata_props[METADATA_KEY])
    fields["layers"][0]["policy"] = policy
    model.metadata_props[METADATA_KEY] = json.dumps(fields)
    with pytest.raises(ModelError, match=message):
        read_kv_cache_spec(model)
