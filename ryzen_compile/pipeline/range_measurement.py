"""Observing: run a model on samples and note the range of each of its float tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ryzen_compile.errors import BackendError
from ryzen_compile.spec.passes import Inputs, ValueRange

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from ryzen_compile.ir.edit.insertion import NameAllocator

_NAME_PREFIX = "ryzen.observed"
_EXTERNAL_WEIGHT_BYTES = 1 << 10
"""Weights from this many bytes on are lent to ONNX Runtime instead of copied into the graph's file."""


def measure_ranges(model: ir.Model, samples: Sequence[Inputs]) -> Mapping[str, ValueRange]:
    """Run `model` on each of `samples` in ONNX Runtime and return the ranges of its float tensors, by name.

    Inputs and whatever the nodes of the main graph compute are ranged, in any float type; weights are not, nor what is
    inside of subgraphs and functions. A range is that of the finite elements: infinities and NaN are the same in every type.
    A tensor that never had an element has the range [0, 0].

    Each range is taken where the tensor is made and before anything else reads it, so the run holds no more tensors than it
    would have held anyway, and two copies of the one at hand. `model` stays as it is.

    Raises:
        BackendError: ONNX Runtime is absent, lacks an op of the model or failed on a sample.
    """
    if not samples:
        return {}
    _require_onnxruntime()
    watched, names = _instrument(model)
    lent = _externalize_weights(watched)  # must be there as long as the session is
    session = _create_session(watched, lent)
    lows, highs = [math.inf] * len(names), [-math.inf] * len(names)
    for number, sample in enumerate(samples):
        seen = _run(session, sample, number)
        for at, value in enumerate(seen[0::2]):
            lows[at] = min(lows[at], float(value))
        for at, value in enumerate(seen[1::2]):
            highs[at] = max(highs[at], float(value))
    return {
        name: ValueRange(low=low, high=high) if low <= high else ValueRange(low=0.0, high=0.0)
        for name, low, high in zip(names, lows, highs, strict=True)
    }


def capture(model: ir.Model, names: Sequence[str]) -> Callable[[Inputs], dict[str, np.ndarray[Any, Any]]]:
    """Return what runs `model` on a sample in ONNX Runtime and returns its tensors called `names`, by name.

    `model` stays as it is.

    Raises:
        BackendError: ONNX Runtime is absent or lacks an op of the model; a call raises it where a sample fails.
    """
    _require_onnxruntime()
    copy = model.clone()
    values = {value.name: value for node in copy.graph for value in node.outputs}
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(values[name] for name in names)
    lent = _externalize_weights(copy)
    session = _create_session(copy, lent)

    def run(sample: Inputs) -> dict[str, np.ndarray[Any, Any]]:
        assert lent is not None  # the session reads them
        return dict(zip(names, _run(session, sample, 0), strict=True))

    return run


def _instrument(model: ir.Model) -> tuple[ir.Model, list[str]]:
    """Return a copy of `model` whose outputs are the low and the high of each float tensor, and the tensors' names."""
    import onnx_ir as ir

    from ryzen_compile.ir.analysis.element_types import element_types
    from ryzen_compile.ir.edit.insertion import NameAllocator, ensure_standard_opset, insert_after

    floats = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
    copy = model.clone()
    types = element_types(copy)
    graph = copy.graph
    made = [value for node in graph for value in node.outputs if value.name]
    tensors = [value for value in (*graph.inputs, *made) if types.get(value) in floats]
    constants = {
        "infinity": ir.tensor(math.inf, dtype=ir.DataType.FLOAT),
        "nothing": ir.tensor(-math.inf, dtype=ir.DataType.FLOAT),
    }
    names, scalars = NameAllocator(copy), {}
    for name, held in constants.items():
        scalars[name] = ir.Value(name=names.allocate(_NAME_PREFIX), type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([]))
        scalars[name].const_value = held
        graph.register_initializer(scalars[name])
    graph.outputs.clear()
    ensure_standard_opset(copy)
    for tensor in tensors:
        users = list(tensor.uses())
        nodes = _range_nodes(tensor, names, scalars, is_fp32=types[tensor] == ir.DataType.FLOAT)
        for user, index in users:
            user.replace_input_with(index, nodes[-1].outputs[0])
        insert_after(tensor, nodes, graph)
        graph.outputs.extend(node.outputs[0] for node in nodes if node.op_type in ("ReduceMin", "ReduceMax"))
    return copy, [str(tensor.name) for tensor in tensors]


def _range_nodes(tensor: ir.Value, names: NameAllocator, scalars: Mapping[str, ir.Value], *, is_fp32: bool) -> list[ir.Node]:
    """Return the nodes that take the range of `tensor`, the last of which gives it on.

    ONNX Runtime would put the reductions of all tensors last, and hold all tensors till then. So the tensor is given on
    through a Reshape to its own shape plus zero, where the zero waits for both reductions.
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
    wide = tensor if is_fp32 else add("Cast", tensor, to=int(float_))
    finite = add("Less", add("Abs", wide), scalars["infinity"])
    low = add("ReduceMin", add("Where", finite, wide, scalars["infinity"]), dtype=float_, keepdims=0)
    high = add("ReduceMax", add("Where", finite, wide, scalars["nothing"]), dtype=float_, keepdims=0)
    never = add("And", add("Less", low, scalars["nothing"]), add("Less", high, scalars["nothing"]))
    shape = add("Add", add("Shape", tensor), add("Cast", never, to=int(ir.DataType.INT64)))
    add("Reshape", tensor, shape)
    return nodes


def _require_onnxruntime() -> None:
    from importlib.util import find_spec

    if find_spec("onnxruntime") is None:
        raise BackendError(
            "ONNX Runtime is not installed, and ranges are measured with it", hint="pip install 'ryzen-compile[cpu]'"
        )


def _create_session(model: ir.Model, external_weights: Mapping[str, Any]) -> Any:
    import onnx_ir as ir
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    # A planned layout would hold each tensor of a dynamic shape to the end; packed weights would be held twice.
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
    """Replace the larger weights of `model` by references, and return what they refer to by name."""
    import onnx_ir as ir
    import onnxruntime as ort

    lent = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if (
            tensor is None
            or tensor.nbytes < _EXTERNAL_WEIGHT_BYTES
            or tensor.dtype.bitwidth < 8
            or tensor.dtype.numpy().isbuiltin != 1
        ):
            continue
        lent[name] = ort.OrtValue.ortvalue_from_numpy(tensor.numpy())
        value.const_value = ir.ExternalTensor(
            _NAME_PREFIX, None, None, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
        )
    return lent


def _run(session: Any, sample: Inputs, sample_index: int) -> list[Any]:
    known = {given.name for given in session.get_inputs()}
    try:
        seen: list[Any] = session.run(None, {name: array for name, array in sample.items() if name in known})
    except _onnxruntime_errors() as error:
        raise BackendError(
            f"ONNX Runtime failed on calibration sample {sample_index}: {_one_line(error)}",
            hint="check the samples against the inputs of the model",
        ) from None
    return seen


def _onnxruntime_errors() -> tuple[type[Exception], ...]:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds = (kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception))
    return (ValueError, *kinds)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
