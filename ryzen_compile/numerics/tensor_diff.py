"""Intermediate tensors of two graphs, compared by name, a few at a time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ryzen_compile.numerics.accumulator import Accumulator
from ryzen_compile.numerics.criteria import Criteria, coarser
from ryzen_compile.numerics.metrics import measure
from ryzen_compile.numerics.onnx_candidates import graph_precision, open_graph

if TYPE_CHECKING:
    import onnx_ir as ir

    from ryzen_compile.spec.interface import Inputs, Outputs

TENSORS_PER_RUN = 16
"""How many tensors of each graph are in memory at a time."""

EXTERNAL_WEIGHT_BYTES = 4096
"""Weights of at least this size are written to disk once and shared by all graphs of a bisection."""


@dataclass(frozen=True)
class TensorDifference:
    """The comparison of a tensor with the tensor of the same name in another graph."""

    met: bool
    message: str
    """The limits that it does not meet; empty if it meets all."""


def tensor_differences(
    before: ir.Model,
    after: ir.Model,
    inputs: Inputs,
    *,
    criteria: Criteria,
    folder: Path,
    baseline_label: str = "the same tensor before the pass",
) -> dict[str, TensorDifference]:
    """Compare every tensor that the main graphs of both models compute under the same name and in the same shape.

    Both models run on `inputs`. Graphs in half precision are rounded after every op. `folder` is for temporary files.
    `baseline_label` names the tensors of `before` in messages. The result is by tensor name.
    """
    names_before = set(_tensor_names(before))
    names = [name for name in _tensor_names(after) if name in names_before]
    precision = coarser(graph_precision(before), graph_precision(after))
    differences: dict[str, TensorDifference] = {}
    for start in range(0, len(names), TENSORS_PER_RUN):
        batch = names[start : start + TENSORS_PER_RUN]
        tensors_before, tensors_after = (_compute_tensors(model, batch, inputs, folder) for model in (before, after))
        for name in batch:
            if tensors_after[name].shape != tensors_before[name].shape:
                continue
            accumulator = Accumulator(criteria, precision)
            measurement = measure(tensors_after[name], tensors_before[name], baseline_label=baseline_label)
            accumulator.add(name, measurement, "")
            reasons = [f"`{name}` {fault}" for fault in measurement.faults]
            reasons += [
                f"{metric.name} of `{name}` is {metric.worst:.6g}, required {metric.required}"
                for metric in accumulator.metrics()
                if not metric.met
            ]
            differences[name] = TensorDifference(met=not reasons, message="; ".join(reasons))
    return differences


def _tensor_names(model: ir.Model) -> list[str]:
    """Return the names of the tensors that the main graph computes, in the order of its nodes."""
    import onnx_ir as ir

    from ryzen_compile.ir.analysis.element_types import element_types

    types = element_types(model)
    values = [value for node in model.graph for value in node.outputs if value in types]
    return [value.name for value in values if value.name and (value.type is None or isinstance(value.type, ir.TensorType))]


def _compute_tensors(model: ir.Model, names: Sequence[str], inputs: Inputs, folder: Path) -> Outputs:
    """Return the tensors `names` of the main graph of `model`, by name."""
    import onnx_ir as ir

    from ryzen_compile.ir.analysis.element_types import element_types
    from ryzen_compile.ir.save import save_to_store

    copy = model.clone()
    types = element_types(copy)
    values = {value.name: value for node in copy.graph for value in node.outputs}
    copy.graph.outputs.clear()
    for name in names:
        value = values[name]
        value.type = value.type or ir.TensorType(types[value])
        copy.graph.outputs.append(value)
    file = folder / "tensors.onnx"
    save_to_store(copy, file, folder / "weights", threshold_bytes=EXTERNAL_WEIGHT_BYTES, check=False)
    with ExitStack() as resources:
        return resources.enter_context(open_graph(file, graph_precision(model))())(inputs)
