"""The tensors inside of two graphs, measured against each other by their names, a few at a time."""

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

    from ryzen_compile.spec.passes import Inputs

TENSORS_PER_RUN = 16
"""How many tensors of each graph are held at a time."""

EXTERNAL_WEIGHT_BYTES = 4096
"""From this size on a weight is written once for all graphs that are tried."""


@dataclass(frozen=True)
class TensorDifference:
    """A tensor of one graph against its namesake of another."""

    met: bool
    message: str
    """What does not meet its limit, in one sentence."""


def tensor_differences(
    before: ir.Model,
    after: ir.Model,
    inputs: Inputs,
    *,
    criteria: Criteria,
    folder: Path,
    baseline_label: str = "its namesake before the pass",
) -> dict[str, TensorDifference]:
    """Measure every tensor that the main graphs of both compute under one name and in one shape, on one feed.

    Graphs in half precision are rounded after every op. `folder` takes what has to be written. `against` is what sentences
    call the tensors of `before`.
    """
    known = set(_tensor_names(before))
    names = [name for name in _tensor_names(after) if name in known]
    precision = coarser(graph_precision(before), graph_precision(after))
    found: dict[str, TensorDifference] = {}
    for at in range(0, len(names), TENSORS_PER_RUN):
        some = names[at : at + TENSORS_PER_RUN]
        theirs, mine = (_compute_tensors(model, some, inputs, folder) for model in (before, after))
        for name in some:
            if mine[name].shape != theirs[name].shape:
                continue
            tally = Accumulator(criteria, precision)
            measured = measure(mine[name], theirs[name], baseline_label=baseline_label)
            tally.add(name, measured, "")
            reasons = [f"`{name}` {fault}" for fault in measured.faults]
            reasons += [
                f"{one.name} of `{name}` is {one.worst:.6g}, required {one.required}" for one in tally.metrics() if not one.met
            ]
            found[name] = TensorDifference(met=not reasons, message="; ".join(reasons))
    return found


def _tensor_names(model: ir.Model) -> list[str]:
    """Return the names of the tensors that the main graph computes, in the order of its nodes."""
    import onnx_ir as ir

    from ryzen_compile.ir.analysis.element_types import element_types

    types = element_types(model)
    made = [value for node in model.graph for value in node.outputs if value in types]
    return [value.name for value in made if value.name and (value.type is None or isinstance(value.type, ir.TensorType))]


def _compute_tensors(model: ir.Model, names: Sequence[str], inputs: Inputs, folder: Path) -> Inputs:
    """Return the tensors called `names` of the main graph of `model`."""
    import onnx_ir as ir

    from ryzen_compile.ir.analysis.element_types import element_types
    from ryzen_compile.ir.save import save_to_store

    copy = model.clone()
    types = element_types(copy)
    wanted = {value.name: value for node in copy.graph for value in node.outputs}
    copy.graph.outputs.clear()
    for name in names:
        value = wanted[name]
        value.type = value.type or ir.TensorType(types[value])
        copy.graph.outputs.append(value)
    file = folder / "tensors.onnx"
    save_to_store(copy, file, folder / "weights", threshold_bytes=EXTERNAL_WEIGHT_BYTES)
    with ExitStack() as resources:
        return resources.enter_context(open_graph(file, graph_precision(model))())(inputs)
