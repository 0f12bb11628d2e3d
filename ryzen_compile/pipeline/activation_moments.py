"""Second moments of activations: run a model on samples and sum the outer products of the rows of some tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from ryzen_compile.backends.onnxruntime.graph_runs import graph_runs
from ryzen_compile.errors import BackendError
from ryzen_compile.ir.save import save
from ryzen_compile.spec.interface import Inputs, Interface

if TYPE_CHECKING:
    import onnx_ir as ir

    from ryzen_compile.ir.edit.builder import NodeBuilder
    from ryzen_compile.processes.limits import ResourceLimits
    from ryzen_compile.progress import Progress

_NAME_PREFIX = "ryzen.moments"


def second_moments(
    model: ir.Model,
    names: Sequence[str],
    samples: Sequence[Inputs],
    *,
    interface: Interface | None = None,
    limits: ResourceLimits | None = None,
    progress: Progress | None = None,
) -> Mapping[str, np.ndarray[Any, Any]]:
    """Run `model` on each of `samples` in ONNX Runtime and return the second moments of the tensors called `names`.

    Those of a tensor (..., features) are the sum of x^T x over its rows x in all samples, (features, features) float64. Rows of
    padding are left out where the tensor has the axes of a mask in `interface`. The products are computed in the graph, and
    only their sums are kept, so that memory does not grow with the samples. The model runs in a child process within `limits`;
    it is not modified.

    Raises:
        BackendError: ONNX Runtime is not installed, lacks an op of the model, or failed on a sample, or the child process
            crashed or exceeded a limit.
    """
    instrumented, outputs = _instrument(model, names, interface)
    with TemporaryDirectory(prefix="ryzen-compile-") as folder:
        graph = Path(folder, "instrumented.onnx")
        save(instrumented, graph, weights="linked")
        try:
            with graph_runs(
                graph, samples, sum_outputs=True, limits=limits, progress=progress, title="measure second moments"
            ) as runs:
                sums = runs[0].outputs()
                return {name: np.array(sums[output], np.float64) for name, output in outputs.items()}
        except BackendError as error:
            raise BackendError(
                f"the activations of this model cannot be measured: {error.message}",
                hint=error.hint or "check the samples against the inputs of the model",
            ) from error


def _instrument(model: ir.Model, names: Sequence[str], interface: Interface | None) -> tuple[ir.Model, dict[str, str]]:
    """Return a copy of `model` whose outputs are the second moments of the tensors, and the output of each tensor."""
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    from ryzen_compile.ir.edit.builder import ModelInfo, NodeBuilder

    copy = model.clone()
    info = ModelInfo(copy)
    builder = NodeBuilder(copy.graph, info)
    values = {value.name: value for value in (*copy.graph.inputs, *(value for node in copy.graph for value in node.outputs))}
    end = ir.node("Identity", [copy.graph.inputs[0]], name=info.names.allocate(_NAME_PREFIX))
    copy.graph.append(end)
    float_, outputs = ir.DataType.FLOAT, {}
    specs = interface.inputs if interface is not None else ()
    masks = {info.shapes.dims(values[spec.name]): spec for spec in specs if spec.role == "mask"}
    copy.graph.outputs.clear()
    for name in names:
        value = values[name]
        dims = info.shapes.dims(value)
        width = dims[-1] if dims else None
        if not isinstance(width, int):
            raise BackendError(f"the number of features of `{name}` is unknown", hint="fold the graph first")
        rows = builder.op(end, "Cast", [value], {"to": int(float_)}, dtype=float_)
        mask = masks.get(dims[:-1]) if dims is not None else None
        if mask is not None and mask.padding_value is not None:
            rows = builder.op(end, "Mul", [rows, _valid_rows(builder, end, values[mask.name], mask.padding_value)])
        flat = builder.op(end, "Reshape", [rows, builder.int64_vector(-1, width)])
        transposed = builder.op(end, "Transpose", [flat], {"perm": [1, 0]})
        moments = builder.op(end, "MatMul", [transposed, flat], dtype=float_, shape=ir.Shape([width, width]))
        copy.graph.outputs.append(moments)
        outputs[name] = str(moments.name)
    copy.graph.remove(end)
    RemoveUnusedNodesPass()(copy)
    return copy, outputs


def _valid_rows(builder: NodeBuilder, before: ir.Node, mask: ir.Value, padding_value: float) -> ir.Value:
    """Return 1 where `mask` is not `padding_value`, else 0, with an axis of size 1 at its end."""
    import onnx_ir as ir

    dtype = builder.types[mask]
    is_padding = builder.op(before, "Equal", [mask, builder.scalar(padding_value, dtype)], dtype=ir.DataType.BOOL)
    is_valid = builder.op(before, "Not", [is_padding])
    floats = builder.op(before, "Cast", [is_valid], {"to": int(ir.DataType.FLOAT)}, dtype=ir.DataType.FLOAT)
    return builder.op(before, "Unsqueeze", [floats, builder.int64_vector(-1)])
