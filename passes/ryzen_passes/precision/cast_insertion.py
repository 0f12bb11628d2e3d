"""Convert nodes to half precision: convert weights, and insert casts where a tensor and its consumer differ in type."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from ryzen_compile.ir.analysis.constants import constant_tensor
from ryzen_compile.ir.analysis.element_types import ElementTypes, annotate_types
from ryzen_compile.ir.edit.insertion import NameAllocator, ensure_standard_opset, insert_after, make_cast, remove_noop_casts
from ryzen_compile.ir.lazy_cast import LazyCastTensor
from ryzen_passes.precision.rules import CastPlan, HalfType

_FLOAT = ir.DataType.FLOAT


@dataclass
class EditedNodes:
    """The names of the nodes that a rewrite inserted and removed."""

    inserted: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)


def insert_casts(
    model: ir.Model,
    types: ElementTypes,
    half: HalfType,
    nodes: Collection[ir.Node],
    cast_plans: Mapping[ir.Node, CastPlan],
    *,
    converted_io: Collection[ir.Value],
) -> EditedNodes:
    """Convert `nodes` of the main graph, and the graph inputs and outputs in `converted_io`, to `half`; edit `model` in place.

    Other nodes, inputs and outputs keep their types.
    """
    return _CastInserter(model, types, half, nodes, cast_plans, converted_io).run()


@dataclass
class _CastInserter:
    model: ir.Model
    types: ElementTypes
    half: HalfType
    nodes: Collection[ir.Node]
    cast_plans: Mapping[ir.Node, CastPlan]
    converted_io: Collection[ir.Value]
    edited: EditedNodes = field(default_factory=EditedNodes)

    def __post_init__(self) -> None:
        self.graph = self.model.graph
        self.names = NameAllocator(self.model)

    def run(self) -> EditedNodes:
        if not self.nodes and not self.converted_io:
            return self.edited
        annotate_types(self.types)
        ensure_standard_opset(self.model)
        nodes = list(self.graph)
        for value in (*self.graph.initializers.values(), *(node.outputs[0] for node in nodes if node.op_type == "Constant")):
            if self.types.get(value) == _FLOAT and (tensor := constant_tensor(value)) is not None:
                self.convert_constant(value, tensor)
        for value in tuple(self.graph.inputs):
            if self.types.get(value) == _FLOAT:
                self.convert_activation(value, is_half=value in self.converted_io)
        for node in nodes:
            is_half = node in self.nodes
            if is_half:
                self.update_dtype_attribute(node)
            for index, value in enumerate(node.outputs):
                if self.types.get(value) == _FLOAT and constant_tensor(value) is None:
                    self.convert_activation(value, is_half=is_half and index in self.cast_plans[node].outputs)
        self.edited.removed += [node.name or "" for node in remove_noop_casts(self.graph, nodes)]
        return self.edited

    def reads_half(self, node: ir.Node, index: int) -> bool:
        return node in self.nodes and index in self.cast_plans[node].inputs

    def convert_constant(self, value: ir.Value, tensor: ir.TensorProtocol) -> None:
        """Convert a weight; add a half-precision copy instead if fp32 nodes read it too."""
        half_uses = [use for use in value.uses() if self.reads_half(*use)]
        if not half_uses:
            return
        converted = LazyCastTensor(tensor, self.half.dtype)
        all_half = len(half_uses) == len(value.uses()) and not value.is_graph_output()
        if all_half and value.is_initializer():
            value.const_value, value.type = converted, ir.TensorType(self.half.dtype)
            return
        copy = ir.Value(
            name=self.names.allocate(f"{value.name}.{self.half.name}"),
            type=ir.TensorType(self.half.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=converted,
        )
        self.graph.register_initializer(copy)
        for node, index in half_uses:
            node.replace_input_with(index, copy)
        if all_half and (producer := value.producer()) is not None:
            self.graph.remove(producer, safe=True)
            self.edited.removed.append(producer.name or "")

    def convert_activation(self, value: ir.Value, *, is_half: bool) -> None:
        """Set the type of a tensor, and insert one cast for all consumers that read it as the other type."""
        cast_dtype, suffix = (_FLOAT, "fp32") if is_half else (self.half.dtype, self.half.name)
        cast_uses = [use for use in value.uses() if self.reads_half(*use) != is_half]
        cast_output = value.is_graph_output() and (value in self.converted_io) != is_half
        name = value.name or ""
        if is_half:
            value.type = ir.TensorType(self.half.dtype)
        if not cast_uses and not cast_output:
            return
        node = make_cast(value, cast_dtype, self.names.allocate(f"{name}.{suffix}"))
        insert_after(value, [node], self.graph)
        self.edited.inserted.append(node.name or "")
        for user, index in cast_uses:
            user.replace_input_with(index, node.outputs[0])
        if cast_output:
            for index, output in enumerate(self.graph.outputs):
                if output is value:
                    self.graph.outputs[index] = node.outputs[0]
            value.name = self.names.allocate(f"{name}.{self.half.name}")
            node.outputs[0].name = name

    def update_dtype_attribute(self, node: ir.Node) -> None:
        """Rewrite the attribute that sets the output type of a node."""
        if not self.cast_plans[node].outputs:
            return
        if node.op_type == "Cast":
            node.attributes["to"] = ir.AttrInt64("to", int(self.half.dtype))
        elif node.op_type == "ConstantOfShape":
            fill = node.attributes.get("value")
            tensor = ir.tensor([0.0], dtype=_FLOAT) if fill is None else fill.value
            node.attributes["value"] = ir.AttrTensor("value", LazyCastTensor(tensor, self.half.dtype))
