"""Helpers for the tests of `fold`: fold a model, run it, and compare the outputs with those of the original."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from ryzen_compile.spec.passes import Change, PassContext
from ryzen_passes.fold import Fold
from ryzen_passes.properties import GRAPH_LIVE
from support.ort_session import run_as_written

Array = np.ndarray[Any, Any]
CONTEXT = PassContext(backend="onnxruntime")


def model(text: str, *, opset: int = 21, ir_version: int = 10, **weights: Array) -> onnx.ModelProto:
    """Parse `text`, with a default header if it has none, and add `weights` as initializers."""
    header = f'<ir_version: {ir_version}, opset_import: ["" : {opset}]>\n'
    proto = onnx.parser.parse_model(text if "opset_import" in text else header + text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items())
    return proto


def fold(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, Change]:
    """Fold a copy of `proto`; assert that no node is dead, the interface is equal, and a second fold changes nothing."""
    graph = ir.from_proto(proto)
    change = Fold().rewrite(graph, CONTEXT)
    assert isinstance(change, Change)
    assert change.summary
    assert GRAPH_LIVE.check(graph) is None
    folded = ir.to_proto(graph)
    assert [_serialized(value) for value in folded.graph.input] == [_serialized(value) for value in proto.graph.input]
    assert [_serialized(value) for value in folded.graph.output] == [_serialized(value) for value in proto.graph.output]
    again = Fold().rewrite(graph, CONTEXT)
    assert not again, again
    assert ir.to_proto(graph).SerializeToString() == folded.SerializeToString()
    return folded, change


def _serialized(value: onnx.ValueInfoProto) -> bytes:
    return value.SerializeToString(deterministic=True)


def run(proto: onnx.ModelProto, inputs: Mapping[str, Any]) -> list[Any]:
    """Run a model on ONNX Runtime without graph optimizations."""
    return run_as_written(proto, inputs)


def assert_same(expected: Sequence[Any], actual: Sequence[Any], *, rtol: float = 0, atol: float = 0) -> None:
    """Assert equal types, shapes and values; without a tolerance, bit for bit (NaN equals NaN)."""
    assert len(expected) == len(actual) > 0
    for want, got in zip(expected, actual, strict=True):
        if isinstance(want, (list, tuple)):
            assert isinstance(got, (list, tuple))
            if want or got:
                assert_same(want, got, rtol=rtol, atol=atol)
        elif want is None or got is None:
            assert want is got
        else:
            left, right = np.asarray(want), np.asarray(got)
            assert (left.dtype, left.shape) == (right.dtype, right.shape)
            if not (rtol or atol) or left.dtype.kind not in "fc":
                assert left.tobytes() == right.tobytes() or np.array_equal(left, right, equal_nan=left.dtype.kind in "fc")
            else:
                np.testing.assert_allclose(right.astype(np.float64), left.astype(np.float64), rtol=rtol, atol=atol)


def ops(proto: onnx.ModelProto) -> list[str]:
    """Return the op types of the main graph, in order."""
    return [node.op_type for node in proto.graph.node]


def fold_and_compare(text: str, *feeds: Mapping[str, Any], **model_args: Any) -> tuple[onnx.ModelProto, Change]:
    """Fold a model and assert that its outputs are equal bit for bit for each of `feeds`."""
    proto = model(text, **model_args)
    folded, change = fold(proto)
    assert feeds
    for feed in feeds:
        assert_same(run(proto, feed), run(folded, feed))
    return folded, change
