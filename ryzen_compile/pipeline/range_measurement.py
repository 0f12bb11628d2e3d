"""Range measurement: run a model on samples in ONNX Runtime and record the value range of each float tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ryzen_compile.backends.onnxruntime.backend import OnnxRuntime
from ryzen_compile.backends.onnxruntime.graph_runs import graph_runs
from ryzen_compile.errors import BackendError
from ryzen_compile.ir.save import save
from ryzen_compile.spec.interface import Inputs, RunFunction
from ryzen_compile.spec.passes import ValueRange

if TYPE_CHECKING:
    import onnx_ir as ir

    from ryzen_compile.ir.edit.insertion import NameAllocator
    from ryzen_compile.processes.limits import ResourceLimits
    from ryzen_compile.progress import Progress

_NAME_PREFIX = "ryzen.observed"


def measure_ranges(
    model: ir.Model,
    samples: Sequence[Inputs],
    *,
    limits: ResourceLimits | None = None,
    progress: Progress | None = None,
) -> Mapping[str, ValueRange]:
    """Run `model` on each of `samples` in ONNX Runtime and return the ranges of its float tensors, by name.

    The model runs in a child process within `limits`.

    Measured are the inputs and the node outputs of the main graph, of any float type. Weights are not measured, nor are tensors
    in subgraphs and functions. A range covers the finite elements: infinities and NaN are the same in every type. A tensor
    without elements in all samples has the range [0, 0].

    Each range is computed right after its tensor and before any other consumer of the tensor, so the run keeps no more tensors
    alive than the model itself does, plus two copies of the tensor being measured. `model` is not modified.

    Raises:
        BackendError: ONNX Runtime is not installed, lacks an op of the model, or failed on a sample, or the child process
            crashed or exceeded a limit.
    """
    if not samples:
        return {}
    instrumented, names = _instrument(model)
    lows, highs = [math.inf] * len(names), [-math.inf] * len(names)
    with TemporaryDirectory(prefix="ryzen-compile-") as folder:
        graph = Path(folder, "instrumented.onnx")
        save(instrumented, graph, weights="linked")
        try:
            with graph_runs(
                graph, samples, optimized=False, limits=limits, progress=progress, title="measure value ranges"
            ) as runs:
                failures = [f"sample {index}: {run.error}" for index, run in enumerate(runs) if run.error is not None]
                if failures:
                    raise BackendError(failures[0])
                results = [list(run.outputs().values()) for run in runs]
        except BackendError as error:
            raise BackendError(
                f"the ranges of this model cannot be measured: {error.message}",
                hint=error.hint or "check the samples against the inputs of the model, or leave them out",
                may_be_one_target=error.may_be_one_target,
            ) from error
    for values in results:
        for index, value in enumerate(values[0::2]):
            lows[index] = min(lows[index], float(value))
        for index, value in enumerate(values[1::2]):
            highs[index] = max(highs[index], float(value))
    return {
        name: ValueRange(low=low, high=high) if low <= high else ValueRange(low=0.0, high=0.0)
        for name, low, high in zip(names, lows, highs, strict=True)
    }


@contextmanager
def capture(model: ir.Model, names: Sequence[str]) -> Iterator[RunFunction]:
    """Yield a function that runs `model` on a sample in ONNX Runtime and returns the tensors called `names`, by name.

    It runs in this process: the caller is a child process. `model` is not modified.

    Raises:
        BackendError: ONNX Runtime is not installed or lacks an op of the model. The function raises it if a sample fails.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    copy = model.clone()
    values = {value.name: value for node in copy.graph for value in node.outputs}
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(values[name] for name in names)
    RemoveUnusedNodesPass()(copy)  # such as the output projection, whose logits may be the largest tensor
    with TemporaryDirectory(prefix="ryzen-compile-") as folder:
        graph = Path(folder, "captured.onnx")
        save(copy, graph, weights="linked")
        with OnnxRuntime(device="cpu", low_memory=True, optimized=False).open(str(graph)) as session:
            yield session.run


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
