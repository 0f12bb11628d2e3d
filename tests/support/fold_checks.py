"""What the tests of `fold` share: fold a model, and hold the result against the model it was made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from ryzen_compile.spec.passes import Change, PassContext
from ryzen_passes.fold import Fold
from ryzen_passes.properties import GRAPH_LIVE

Array = np.ndarray[Any, Any]
CONTEXT = PassContext(backend="onnxruntime")


def model(text: str, *, opset: int = 21, ir_version: int = 10, **weights: Array) -> onnx.ModelProto:
    """Parse `text`, under a header with this opset where it has none, and give it `weights`."""
    header = f'<ir_version: {ir_version}, opset_import: ["" : {opset}]>\n'
    proto = onnx.parser.parse_model(text if "opset_import" in text else header + text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items())
    return proto


def fold(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, Change]:
    """Fold a copy of `proto`; check what holds of every fold: nothing dead, the same interface, nothing left to fold."""
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
    """Run a model as it is written: ONNX Runtime's own folding is off."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    results: list[Any] = session.run(None, dict(inputs))
    return results


def assert_same(expected: Sequence[Any], actual: Sequence[Any], *, rtol: float = 0, atol: float = 0) -> None:
    """Assert equal types, shapes and values: to the last bit where no tolerance is given."""
    assert len(expected) == len(actual) > 0
    for one, other in zip(expected, actual, strict=True):
        if isinstance(one, (list, tuple)):
            assert isinstance(other, (list, tuple))
            if one or other:
                assert_same(one, other, rtol=rtol, atol=atol)
        elif one is None or other is None:
            assert one is other
        else:
            left, right = np.asarray(one), np.asarray(other)
            assert (left.dtype, left.shape) == (right.dtype, right.shape)
            if not (rtol or atol) or left.dtype.kind not in "fc":
                assert left.tobytes() == right.tobytes() or np.array_equal(left, right, equal_nan=left.dtype.kind in "fc")
            else:
                np.testing.assert_allclose(right.astype(np.float64), left.astype(np.float64), rtol=rtol, atol=atol)


def ops(proto: onnx.ModelProto) -> list[str]:
    """Return the ops of the main graph, in order."""
    return [node.op_type for node in proto.graph.node]


def fold_and_compare(text: str, *feeds: Mapping[str, Any], **model_args: Any) -> tuple[onnx.ModelProto, Change]:
    """Fold a model and assert that it computes the same, to the last bit, for each of `feeds`."""
    proto = model(text, **model_args)
    folded, change = fold(proto)
    assert feeds
    for feed in feeds:
        assert_same(run(proto, feed), run(folded, feed))
    return folded, change
