"""Statistics of activations: run a model on samples and sum functions of the rows of some tensors.

The functions are computed in the graph, and only their sums over the samples are kept, so that memory does not grow with the
samples. Rows of padding are left out where a tensor has the axes of a mask of the interface.
"""

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

    from ryzen_compile.processes.limits import ResourceLimits
    from ryzen_compile.progress import Progress

Array = np.ndarray[Any, Any]

_NAME_PREFIX = "ryzen.statistics"
_SMALLEST_NORM = 1e-12
_AXES_INPUT_OPSET = 13
"""The opset in which ReduceSum and Unsqueeze take their axes as an input."""


def second_moments(
    model: ir.Model,
    names: Sequence[str],
    samples: Sequence[Inputs],
    *,
    interface: Interface | None = None,
    limits: ResourceLimits | None = None,
    progress: Progress | None = None,
) -> Mapping[str, Array]:
    """Run `model` on each of `samples` in ONNX Runtime and return the second moments of the tensors called `names`.

    Those of a tensor (..., features) are the sum of x^T x over its rows x in all samples, (features, features) float64. The
    model runs in a child process within `limits`; it is not modified.

    Raises:
        BackendError: ONNX Runtime is not installed, lacks an op of the model, or failed on a sample, or the child process
            crashed or exceeded a limit.
    """
    graph = _StatisticsGraph(model, interface)
    outputs = {name: graph.add_second_moments(name) for name in names}
    sums = _run(graph.finish(), samples, limits, progress, "measure second moments")
    return {name: sums[output] for name, output in outputs.items()}


def mean_cosines(
    model: ir.Model,
    pairs: Sequence[tuple[str, str]],
    samples: Sequence[Inputs],
    *,
    interface: Interface | None = None,
    limits: ResourceLimits | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Return the mean cosine similarity of the rows of two tensors (..., features), for each of `pairs`, over all samples.

    A row of zeros has the similarity 0. Raises BackendError as `second_moments` does.
    """
    graph = _StatisticsGraph(model, interface)
    outputs = [graph.add_cosines(*pair) for pair in pairs]
    sums = _run(graph.finish(), samples, limits, progress, "measure cosine similarities")
    return [float(sums[cosines] / max(float(sums[count]), 1.0)) for cosines, count in outputs]


def _run(
    model: ir.Model, samples: Sequence[Inputs], limits: ResourceLimits | None, progress: Progress | None, title: str
) -> dict[str, Array]:
    """Return the sums of the outputs of `model` over the samples."""
    with TemporaryDirectory(prefix="ryzen-compile-") as folder:
        graph = Path(folder, "instrumented.onnx")
        save(model, graph, weights="linked")
        try:
            with graph_runs(graph, samples, sum_outputs=True, limits=limits, progress=progress, title=title) as runs:
                return {name: np.array(array, np.float64) for name, array in runs[0].outputs().items()}
        except BackendError as error:
            raise BackendError(
                f"the activations of this model cannot be measured: {error.message}",
                hint=error.hint or "check the samples against the inputs of the model",
            ) from error


class _StatisticsGraph:
    """A copy of a model whose outputs are statistics of its tensors."""

    def __init__(self, model: ir.Model, interface: Interface | None) -> None:
        import onnx_ir as ir

        from ryzen_compile.ir.edit.builder import ModelInfo, NodeBuilder

        self._model = model.clone()
        graph = self._model.graph
        info = ModelInfo(self._model)
        self._shapes, self._builder = info.shapes, NodeBuilder(graph, info)
        self._values = {value.name: value for value in (*graph.inputs, *(value for node in graph for value in node.outputs))}
        specs = interface.inputs if interface is not None else ()  # of the source: an earlier pass may have removed inputs
        masks = [spec for spec in specs if spec.role == "mask" and spec.name in self._values]
        self._masks = {self._shapes.dims(self._values[spec.name]): spec for spec in masks}
        graph.outputs.clear()
        self._end = ir.node("Identity", [graph.inputs[0]], name=info.names.allocate(_NAME_PREFIX))
        graph.append(self._end)

    def add_second_moments(self, name: str) -> str:
        """Add the sum of x^T x over the rows x of a tensor; return the name of the output."""
        rows, width = self._rows(name)
        flat = self._op("Reshape", rows, self._builder.int64_vector(-1, width))
        transposed = self._op("Transpose", flat, perm=[1, 0])
        return self._output(self._op("MatMul", transposed, flat), width, width)

    def add_cosines(self, first: str, second: str) -> tuple[str, str]:
        """Add the sum of the cosine similarities of the rows of two tensors and the number of rows; return their names."""
        (a, _), (b, _) = self._rows(first), self._rows(second)
        norms = [self._op("Sqrt", self._on_last_axis("ReduceSum", self._op("Mul", rows, rows), keepdims=0)) for rows in (a, b)]
        products = self._on_last_axis("ReduceSum", self._op("Mul", a, b), keepdims=0)
        lengths = self._op("Max", self._op("Mul", *norms), self._scalar(_SMALLEST_NORM))
        positive = self._op("Greater", norms[0], self._scalar(0.0), dtype="BOOL")
        sums = [self._op("Div", products, lengths), self._op("Cast", positive, to=1, dtype="FLOAT")]
        cosines, count = (self._output(self._op("ReduceSum", value, keepdims=0)) for value in sums)
        return cosines, count

    def finish(self) -> ir.Model:
        """Return the model with the outputs that were added, without nodes that do not contribute to them."""
        from onnx_ir.passes.common import RemoveUnusedNodesPass

        self._model.graph.remove(self._end)
        RemoveUnusedNodesPass()(self._model)
        return self._model

    def _rows(self, name: str) -> tuple[ir.Value, int]:
        """Return a tensor in float32, with zeros in place of rows of padding, and the number of its features."""
        value = self._values[name]
        dims = self._shapes.dims(value)
        width = dims[-1] if dims else None
        if dims is None or not isinstance(width, int):
            raise BackendError(f"the number of features of `{name}` is unknown", hint="fold the graph first")
        rows = self._op("Cast", value, to=1, dtype="FLOAT")
        mask = self._masks.get(dims[:-1])
        if mask is None or mask.padding_value is None:
            return rows, width
        tokens = self._values[mask.name]
        padding = self._builder.scalar(mask.padding_value, self._builder.types[tokens])
        is_valid = self._op("Not", self._op("Equal", tokens, padding, dtype="BOOL"))
        valid = self._on_last_axis("Unsqueeze", self._op("Cast", is_valid, to=1, dtype="FLOAT"))
        return self._op("Mul", rows, valid), width

    def _op(self, op_type: str, *inputs: ir.Value | None, dtype: str | None = None, **attributes: Any) -> ir.Value:
        import onnx_ir as ir

        element_type = ir.DataType[dtype] if dtype is not None else None
        return self._builder.op(self._end, op_type, inputs, attributes, dtype=element_type)

    def _on_last_axis(self, op_type: str, value: ir.Value, **attributes: Any) -> ir.Value:
        """Apply an op to the last axis, which it takes as an input from opset 13 on."""
        if self._model.graph.opset_imports.get("", 1) < _AXES_INPUT_OPSET:
            return self._op(op_type, value, axes=[-1], **attributes)
        return self._op(op_type, value, self._builder.int64_vector(-1), **attributes)

    def _scalar(self, value: float) -> ir.Value:
        import onnx_ir as ir

        return self._builder.scalar(value, ir.DataType.FLOAT)

    def _output(self, value: ir.Value, *shape: int) -> str:
        import onnx_ir as ir

        value.shape = ir.Shape(shape)
        self._model.graph.outputs.append(value)
        return str(value.name)
