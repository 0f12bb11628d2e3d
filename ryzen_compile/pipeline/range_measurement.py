"""Range measurement: run a model on samples in ONNX Runtime and record the value range of each float tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ryzen_compile.errors import BackendError
from ryzen_compile.spec.interface import Inputs
from ryzen_compile.spec.passes import ValueRange

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from ryzen_compile.ir.edit.insertion import NameAllocator

_NAME_PREFIX = "ryzen.observed"
_EXTERNAL_WEIGHT_BYTES = 1 << 10
"""Weights of at least this size are passed to ONNX Runtime by reference instead of serialized with the graph."""


def measure_ranges(model: ir.Model, samples: Sequence[Inputs]) -> Mapping[str, ValueRange]:
    """Run `model` on each of `samples` in ONNX Runtime and return the ranges of its float tensors, by name.

    Measured are the inputs and the node outputs of the main graph, of any float type. Weights are not measured, nor are tensors
    in subgraphs and functions. A range covers the finite elements: infinities and NaN are the same in every type. A tensor
    without elements in all samples has the range [0, 0].

    Each range is computed right after its tensor and before any other consumer of the tensor, so the run keeps no more tensors
    alive than the model itself does, plus two copies of the tensor being measured. `model` is not modified.

    Raises:
        BackendError: ONNX Runtime is not installed, lacks an op of the model, or failed on a sample.
    """
    if not samples:
        return {}
    _require_onnxruntime()
    instrumented, names = _instrument(model)
    external_weights = _externalize_weights(instrumented)  # must outlive the session
    session = _create_session(instrumented, external_weights)
    lows, highs = [math.inf] * len(names), [-math.inf] * len(names)
    for sample_index, sample in enumerate(samples):
        results = _run(session, sample, sample_index)
        for index, value in enumerate(results[0::2]):
            lows[index] = min(lows[index], float(value))
        for index, value in enumerate(results[1::2]):
            highs[index] = max(highs[index], float(value))
    return {
        name: ValueRange(low=low, high=high) if low <= high else ValueRange(low=0.0, high=0.0)
        for name, low, high in zip(names, lows, highs, strict=True)
    }


def capture(model: ir.Model, names: Sequence[str]) -> Callable[[Inputs], dict[str, np.ndarray[Any, Any]]]:
    """Return a function that runs `model` on a sample in ONNX Runtime and returns the tensors called `names`, by name.

    `model` is not modified.

    Raises:
        BackendError: ONNX Runtime is not installed or lacks an op of the model. The function raises it if a sample fails.
    """
    _require_onnxruntime()
    copy = model.clone()
    values = {value.name: value for node in copy.graph for value in node.outputs}
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(values[name] for name in names)
    external_weights = _externalize_weights(copy)
    session = _create_session(copy, external_weights)

    def run(sample: Inputs) -> dict[str, np.ndarray[Any, Any]]:
        assert external_weights is not None  # keeps a reference: the session reads the weights
        return dict(zip(names, _run(session, sample, 0), strict=True))

    return run


def _instrument(model: ir.Model) -> tuple[ir.Model, list[str]]:
    """Return a copy of `model` whose outputs are the minimum and the maximum of each float tensor, and the tensors' names."""
    import onnx_ir as ir

    from ryzen_compile.ir.analysis.element_types import element_types
    from ryzen_compile.ir.edit.insertion import NameAllocator, ensure_standard_opset, insert_after

    float_types = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
    copy = model.clone()
    types = element_types(copy)
    graph = copy.graph
    node_outputs = [value for node in graph for value in node.outputs if value.name]
    tensors = [value for value in (*graph.inputs, *node_outputs) if types.get(value) in float_types]
    constants = {
        "infinity": ir.tensor(math.inf, dtype=ir.DataType.FLOAT),
        "minus_infinity": ir.tensor(-math.inf, dtype=ir.DataType.FLOAT),
    }
    names, scalars = NameAllocator(copy), {}
    for name, constant in constants.items():
        scalars[name] = ir.Value(name=names.allocate(_NAME_PREFIX), type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([]))
        scalars[name].const_value = constant
        graph.register_initializer(scalars[name])
    graph.outputs.clear()
    ensure_standard_opset(copy)
    for tensor in tensors:
        uses = list(tensor.uses())
        nodes = _range_nodes(tensor, names, scalars, is_fp32=types[tensor] == ir.DataType.FLOAT)
        for consumer, input_index in uses:
            consumer.replace_input_with(input_index, nodes[-1].outputs[0])
        insert_after(tensor, nodes, graph)
        graph.outputs.extend(node.outputs[0] for node in nodes if node.op_type in ("ReduceMin", "ReduceMax"))
    return copy, [str(tensor.name) for tensor in tensors]


def _range_nodes(tensor: ir.Value, names: NameAllocator, scalars: Mapping[str, ir.Value], *, is_fp32: bool) -> list[ir.Node]:
    """Return the nodes that compute the range of `tensor`; the last one outputs `tensor` unchanged.

    ONNX Runtime would schedule the reductions of all tensors last and keep all tensors alive until then. To prevent that,
    consumers read the tensor through a Reshape to its own shape plus a zero, and the zero depends on both reductions.
    """
    import onnx_ir as ir

    nodes: list[ir.Node] = []

    def add(op_type: str, *inputs: ir.Value, dtype: ir.DataType | None = None, **attributes: int) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes, name=names.allocate(_NAME_PREFIX))
        node.outputs[0].name = node.name
        if dtype is not None:
            node.outputs[0].type = ir.TensorType(dtype)
            node.outputs[0].shape = ir.Shape([])
        nodes.append(node)
        return node.outputs[0]

    float_ = ir.DataType.FLOAT
    fp32 = tensor if is_fp32 else add("Cast", tensor, to=int(float_))
    is_finite = add("Less", add("Abs", fp32), scalars["infinity"])
    low = add("ReduceMin", add("Where", is_finite, fp32, scalars["infinity"]), dtype=float_, keepdims=0)
    high = add("ReduceMax", add("Where", is_finite, fp32, scalars["minus_infinity"]), dtype=float_, keepdims=0)
    always_false = add("And", add("Less", low, scalars["minus_infinity"]), add("Less", high, scalars["minus_infinity"]))
    shape = add("Add", add("Shape", tensor), add("Cast", always_false, to=int(ir.DataType.INT64)))
    add("Reshape", tensor, shape)
    return nodes


def _require_onnxruntime() -> None:
    from importlib.util import find_spec

    if find_spec("onnxruntime") is None:
        raise BackendError(
            "ONNX Runtime is not installed, and range measurement requires it", hint="pip install 'ryzen-compile[cpu]'"
        )


def _create_session(model: ir.Model, external_weights: Mapping[str, Any]) -> Any:
    import onnx_ir as ir
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    # A memory pattern would keep each tensor of dynamic shape until the end of the run; prepacking would copy the weights.
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_external_initializers(list(external_weights), list(external_weights.values()))
    try:
        return ort.InferenceSession(
            ir.serde.serialize_model(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except _onnxruntime_errors() as error:
        raise BackendError(
            f"ONNX Runtime cannot run this model to measure its ranges: {_one_line(error)}",
            hint="leave the calibration samples out",
        ) from None


def _externalize_weights(model: ir.Model) -> dict[str, Any]:
    """Replace the larger weights of `model` by references, and return the referenced values by name."""
    import onnx_ir as ir
    import onnxruntime as ort

    weights = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if (
            tensor is None
            or tensor.nbytes < _EXTERNAL_WEIGHT_BYTES
            or tensor.dtype.bitwidth < 8
            or tensor.dtype.numpy().isbuiltin != 1
        ):
            continue
        weights[name] = ort.OrtValue.ortvalue_from_numpy(tensor.numpy())
        value.const_value = ir.ExternalTensor(
            _NAME_PREFIX, None, None, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
        )
    return weights


def _run(session: Any, sample: Inputs, sample_index: int) -> list[Any]:
    input_names = {input_.name for input_ in session.get_inputs()}
    try:
        results: list[Any] = session.run(None, {name: array for name, array in sample.items() if name in input_names})
    except _onnxruntime_errors() as error:
        raise BackendError(
            f"ONNX Runtime failed on calibration sample {sample_index}: {_one_line(error)}",
            hint="check the samples against the inputs of the model",
        ) from None
    return results


def _onnxruntime_errors() -> tuple[type[Exception], ...]:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    error_types = (value for value in vars(state).values() if isinstance(value, type) and issubclass(value, Exception))
    return (ValueError, *error_types)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
