"""Raising a model's opset where every node keeps its meaning.

From opset 13 on most new versions of an op add element types and nothing else. The others are listed here: those that
only spell the same thing differently are respelled, those that mean something else stop the raise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

MIN_OPSET = 13
"""The opset below which too much means something else."""

_SEMANTICS_CHANGED = {"RoiAlign": 16, "GridSample": 20, "DFT": 20, "GroupNormalization": 21}
"""op -> the opset in which it came to mean something else: another default, other names of modes, other shapes."""

_AXES_TO_INPUT = {f"Reduce{kind}" for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")}
"""Ops whose `axes` became an input in opset 18."""


def standard_opset(model: ir.Model) -> int:
    """Return the version of the standard ops that `model` is written in."""
    return model.graph.opset_imports.get("", model.graph.opset_imports.get("ai.onnx", 1))


def raise_opset(model: ir.Model, to: int) -> str | None:
    """Bring `model` to opset `to` in place, or return why it cannot be; it is then as it was."""
    have = standard_opset(model)
    if have >= to:
        return None
    if have < MIN_OPSET:
        return f"the model is of opset {have}, and below {MIN_OPSET} too many ops mean something else"
    respell: list[Callable[[], None]] = []
    for node in _all_nodes(model):
        if node.domain not in ("", "ai.onnx"):
            continue
        if have < _SEMANTICS_CHANGED.get(node.op_type, 0) <= to:
            return f"`{node.name}`: {node.op_type} means something else from opset {_SEMANTICS_CHANGED[node.op_type]} on"
        if node.op_type == "BatchNormalization" and have < 14 and len(node.outputs) > 1:
            return f"`{node.name}`: a BatchNormalization that trains is written differently from opset 14 on"
        if have < 18 <= to and node.op_type in _AXES_TO_INPUT and "axes" in node.attributes:
            respell.append(_axes_to_input(node))
        if have < 18 <= to and node.op_type == "Split" and len(node.inputs) < 2:
            respell.append(_add_num_outputs(node))
    for do in respell:
        do()
    for imports in (model.graph.opset_imports, *(function.opset_imports for function in model.functions.values())):
        imports.pop("ai.onnx", None)
        imports[""] = to
    model.ir_version = max(model.ir_version, 10)
    return None


def _all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _axes_to_input(node: ir.Node) -> Callable[[], None]:
    def do() -> None:
        axes = ir.node("Constant", [], {"value": ir.tensor(np.array(node.attributes.pop("axes").as_ints(), np.int64))})
        axes.outputs[0].name = f"{node.name or node.op_type}_axes"
        graph = node.graph
        if graph is not None:
            graph.insert_before(node, axes)
        node.resize_inputs(2)
        node.replace_input_with(1, axes.outputs[0])

    return do


def _add_num_outputs(node: ir.Node) -> Callable[[], None]:
    def do() -> None:
        node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))

    return do
