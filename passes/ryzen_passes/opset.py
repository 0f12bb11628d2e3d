"""Opset conversion: raise the ONNX opset of a model if every node keeps its semantics.

From opset 13 on, most new versions of an op only add element types. This module lists the exceptions: ops whose syntax changed
are converted, ops whose semantics changed stop the conversion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.analysis.op_traits import REDUCE_OPS
from ryzen_compile.ir.edit.insertion import NameAllocator
from ryzen_compile.ir.traversal import nested_graphs

MIN_OPSET = 13
"""The lowest opset that can be raised; the semantics of too many ops change below it."""

_SEMANTICS_CHANGED = {"RoiAlign": 16, "GridSample": 20, "DFT": 20, "GroupNormalization": 21}
"""Op type to the opset that changed its semantics: another default, other mode names or other shapes."""

_AXES_TO_INPUT = REDUCE_OPS - {"ReduceSum"}
"""Ops whose attribute `axes` became an input in opset 18."""


def standard_opset(model: ir.Model) -> int:
    """Return the version of the standard ONNX domain that `model` imports; 1 if it imports none."""
    return model.graph.opset_imports.get("", model.graph.opset_imports.get("ai.onnx", 1))


def raise_opset(model: ir.Model, to: int) -> str | None:
    """Raise `model` to opset `to` in place.

    Return None on success, also if the opset is already `to` or above; else the reason, with `model` unchanged.
    """
    current = standard_opset(model)
    if current >= to:
        return None
    if current < MIN_OPSET:
        return f"the model has opset {current}; below opset {MIN_OPSET} too many ops have other semantics"
    conversions: list[Callable[[], None]] = []
    names = NameAllocator(model)
    for node in _all_nodes(model):
        if node.domain not in ("", "ai.onnx"):
            continue
        if current < _SEMANTICS_CHANGED.get(node.op_type, 0) <= to:
            return f"`{node.name}`: the semantics of {node.op_type} change in opset {_SEMANTICS_CHANGED[node.op_type]}"
        if node.op_type == "BatchNormalization" and current < 14 and len(node.outputs) > 1:
            return f"`{node.name}`: the training outputs of BatchNormalization change in opset 14"
        if current < 18 <= to and node.op_type in _AXES_TO_INPUT and "axes" in node.attributes:
            if (omitted := _omitted_reference(model, node, "axes")) is not None:
                return omitted
            conversions.append(_axes_to_input(node, names))
        if current < 18 <= to and node.op_type == "Split" and len(node.inputs) < 2:
            conversions.append(_add_num_outputs(node))
    for convert in conversions:
        convert()
    for imports in (model.graph.opset_imports, *(function.opset_imports for function in model.functions.values())):
        imports.pop("ai.onnx", None)
        imports[""] = to
    model.ir_version = max(model.ir_version, 10)
    return None


def _all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _omitted_reference(model: ir.Model, node: ir.Node, name: str) -> str | None:
    """Return the call of a function that omits the attribute which attribute `name` of `node` refers to, or None."""
    reference = node.attributes[name].ref_attr_name
    if reference is None:
        return None
    for function in model.functions.values():
        parameter = function.attributes.get(reference)
        has_default = parameter is not None and parameter.value is not None
        if has_default or all(node.graph is not graph for graph in nested_graphs(function.graph)):
            continue
        for call in _all_nodes(model):
            if call.op_identifier() == function.identifier() and reference not in call.attributes:
                return f"`{call.name}`: the call of {function.name} omits `{reference}`, which becomes an input in opset 18"
    return None


def _axes_to_input(node: ir.Node, names: NameAllocator) -> Callable[[], None]:
    def convert() -> None:
        attribute = node.attributes.pop("axes")
        name = names.allocate(f"{node.name or node.op_type}_axes")
        if attribute.is_ref():
            value = ir.RefAttr("value_ints", attribute.ref_attr_name or "", ir.AttributeType.INTS)
        else:
            value = ir.AttrTensor("value", ir.tensor(np.array(attribute.as_ints(), np.int64)))
        axes = ir.Node("", "Constant", [], [value], name=name)
        axes.outputs[0].name = name
        graph = node.graph
        if graph is not None:
            graph.insert_before(node, axes)
        node.resize_inputs(2)
        node.replace_input_with(1, axes.outputs[0])

    return convert


def _add_num_outputs(node: ir.Node) -> Callable[[], None]:
    def convert() -> None:
        node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))

    return convert
