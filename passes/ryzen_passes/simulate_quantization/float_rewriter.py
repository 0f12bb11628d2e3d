"""Rewriting of quantized nodes: integers become float32 tensors of integral values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.analysis.constants import constant_tensor, int_attribute
from ryzen_compile.ir.edit.builder import ModelInfo, NodeBuilder, remove_dead_nodes, replace_value
from ryzen_passes.simulate_quantization.quantized_regions import Region, find_quantized_values, rank_of

Array = np.ndarray[Any, np.dtype[Any]]

_FLOAT = ir.DataType.FLOAT


class FloatRewriter:
    """Rewrites the regions of one model; see `quantized_regions.find_regions`."""

    def __init__(self, model: ir.Model) -> None:
        """Rewrite regions of the main graph of `model`."""
        self._model_info = ModelInfo(model)
        self._types = self._model_info.types
        self._graph = model.graph
        self._quantized = set(find_quantized_values(model.graph, self._types))
        self._builder = NodeBuilder(model.graph, self._model_info)
        self._floats: dict[ir.Value, ir.Value] = {}
        """Quantized tensor -> the float32 tensor of its integers."""
        self._constants: dict[tuple[object, ...], ir.Value] = {}

    @property
    def inserted(self) -> list[str]:
        """The names of the inserted nodes."""
        return self._builder.inserted

    def rewrite(self, region: Region) -> None:
        """Rewrite the nodes of `region`, which stay in the graph until `remove_dead_nodes`."""
        for node in region:
            match node.op_type:
                case "QuantizeLinear":
                    self._quantize_linear(node)
                case "DequantizeLinear":
                    self._dequantize_linear(node)
                case "DynamicQuantizeLinear":
                    self._dynamic_quantize_linear(node)
                case "MatMulInteger":
                    self._floats[node.outputs[0]] = self._matmul(
                        node, node.inputs[0], node.inputs[1], _input(node, 2), _input(node, 3)
                    )
                case "ConvInteger":
                    self._floats[node.outputs[0]] = self._conv(
                        node, node.inputs[0], node.inputs[1], _input(node, 2), _input(node, 3)
                    )
                case "QLinearMatMul":
                    a, a_scale, a_zero, b, b_scale, b_zero, scale, zero = node.inputs
                    product = self._matmul(node, a, b, a_zero, b_zero)
                    self._requantize(node, product, a_scale, b_scale, scale, zero, channel_rank=None)
                case "QLinearConv":
                    x, x_scale, x_zero, w, w_scale, w_zero, scale, zero = node.inputs[:8]
                    product = self._conv(node, x, w, x_zero, w_zero, bias=_input(node, 8))
                    self._requantize(node, product, x_scale, w_scale, scale, zero, channel_rank=rank_of(w))
                case "Cast":
                    self._cast(node)
                case "Add":
                    self._floats[node.outputs[0]] = self._op(
                        node, "Add", *(self._integer(node, value) for value in node.inputs)
                    )
                case _:
                    self._move(node)
            self._restore_graph_outputs(node)

    def remove_dead_nodes(self, nodes: Region) -> list[str]:
        """Remove the rewritten nodes and the constants that only they read; return the names of the nodes."""
        return remove_dead_nodes(nodes[::-1])

    def _op(self, before: ir.Node, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        return self._builder.op(before, op_type, inputs, attributes, dtype=_FLOAT)

    def _quantize_linear(self, node: ir.Node) -> None:
        x, scale, zero = node.inputs[0], node.inputs[1], _input(node, 2)
        assert x is not None
        shape = self._axis_shape(node, x)
        quotient = self._op(node, "Div", x, self._scale(node, scale, shape))
        self._floats[node.outputs[0]] = self._round_and_clip(
            node, quotient, None if zero is None else self._zero(node, zero, shape), self._types[node.outputs[0]]
        )

    def _dequantize_linear(self, node: ir.Node) -> None:
        x, scale, zero = node.inputs[0], node.inputs[1], _input(node, 2)
        assert x is not None
        shape = self._axis_shape(node, x)
        tensors = [constant_tensor(value) for value in (x, scale, zero)]
        output = node.outputs[0]
        if tensors[0] is not None and tensors[1] is not None and (zero is None or tensors[2] is not None):
            new = self._constant(
                ("dequantized", x, scale, zero, shape), tensors[0], lambda: _dequantize(tensors, shape), output.name
            )
        else:
            new = self._op(node, "Mul", self._centered(node, x, zero, shape), self._scale(node, scale, shape))
        if output.is_graph_output() and constant_tensor(new) is not None:
            new = self._op(node, "Identity", new)
        replace_value(output, new)

    def _dynamic_quantize_linear(self, node: ir.Node) -> None:
        """Rewrite by the formulas of the op, with ONNX Runtime's scale of 1 for an input of zeros."""
        x, zero = node.inputs[0], self._builder.scalar(0.0, _FLOAT)
        low = self._op(node, "Min", self._op(node, "ReduceMin", x, keepdims=0), zero)
        high = self._op(node, "Max", self._op(node, "ReduceMax", x, keepdims=0), zero)
        step = self._op(node, "Div", self._op(node, "Sub", high, low), self._builder.scalar(255.0, _FLOAT))
        is_zero = self._builder.op(node, "Equal", [step, zero], dtype=ir.DataType.BOOL)
        scale = self._op(node, "Where", is_zero, self._builder.scalar(1.0, _FLOAT), step)
        negated = self._op(node, "Neg", self._op(node, "Div", low, scale))
        zero_point = self._op(node, "Round", self._clip(node, negated, 0, 255))
        quotient = self._op(node, "Div", x, scale)
        self._floats[node.outputs[0]] = self._round_and_clip(node, quotient, zero_point, ir.DataType.UINT8)
        if len(node.outputs) > 2:
            self._floats[node.outputs[2]] = zero_point
        replace_value(node.outputs[1], scale)

    def _matmul(
        self, node: ir.Node, a: ir.Value | None, b: ir.Value | None, a_zero: ir.Value | None, b_zero: ir.Value | None
    ) -> ir.Value:
        rows = (-1, 1) if a_zero is not None and _size(a_zero) > 1 else None
        return self._op(node, "MatMul", self._centered(node, a, a_zero, rows), self._centered(node, b, b_zero, None))

    def _conv(
        self,
        node: ir.Node,
        x: ir.Value | None,
        w: ir.Value | None,
        x_zero: ir.Value | None,
        w_zero: ir.Value | None,
        *,
        bias: ir.Value | None = None,
    ) -> ir.Value:
        """Return the convolution of the centered integers: padding has the value of the zero point, which is 0 then."""
        rank = rank_of(w)
        filters = (-1, *[1] * (rank - 1)) if rank is not None and w_zero is not None and _size(w_zero) > 1 else None
        operands = [self._centered(node, x, x_zero, None), self._centered(node, w, w_zero, filters)]
        if bias is not None:
            operands.append(self._integer(node, bias))
        return self._builder.op(node, "Conv", operands, dict(node.attributes), dtype=_FLOAT)

    def _requantize(
        self,
        node: ir.Node,
        product: ir.Value,
        left_scale: ir.Value | None,
        right_scale: ir.Value | None,
        scale: ir.Value | None,
        zero: ir.Value | None,
        *,
        channel_rank: int | None,
    ) -> None:
        """Scale a sum of products to the integers of the output; `channel_rank` is the rank of convolution weights."""
        channels = (-1, *[1] * (channel_rank - 2)) if channel_rank is not None and right_scale is not None else None
        per_channel = channels if right_scale is not None and _size(right_scale) > 1 else None
        left, right = self._scale(node, left_scale, None), self._scale(node, right_scale, per_channel)
        factor = self._op(node, "Div", self._op(node, "Mul", left, right), self._scale(node, scale, None))
        zero_point = None if zero is None else self._zero(node, zero, None)
        scaled = self._op(node, "Mul", product, factor)
        self._floats[node.outputs[0]] = self._round_and_clip(node, scaled, zero_point, self._types[node.outputs[0]])

    def _cast(self, node: ir.Node) -> None:
        to = ir.DataType(int_attribute(node, "to", int(_FLOAT)))
        integers = self._integer(node, node.inputs[0])
        if to == _FLOAT and not node.outputs[0].is_graph_output():
            node.outputs[0].replace_all_uses_with(integers)
        else:
            replace_value(node.outputs[0], self._builder.op(node, "Cast", [integers], {"to": int(to)}, dtype=to))

    def _move(self, node: ir.Node) -> None:
        """Apply an op that moves elements to the float32 tensors."""
        quantized = [value in self._quantized for value in node.inputs]
        inputs = [self._integer(node, value) if moved else value for value, moved in zip(node.inputs, quantized, strict=True)]
        name = self._builder.names.allocate(f"{node.name or node.op_type.lower()}_float")
        moved = ir.node(node.op_type, inputs, dict(node.attributes), num_outputs=len(node.outputs), name=name)
        dtypes = [_FLOAT if value in self._quantized else self._types[value] for value in node.outputs]
        for old, new in zip(node.outputs, self._builder.insert_node(node, moved, dtypes), strict=True):
            new.shape = old.shape
            self._floats[old] = new

    def _restore_graph_outputs(self, node: ir.Node) -> None:
        """Cast the float32 form of a quantized graph output to its type; nodes that read it read the cast."""
        for value in node.outputs:
            if value.is_graph_output() and value in self._floats:
                dtype = self._types[value]
                cast = self._builder.op(node, "Cast", [self._floats[value]], {"to": int(dtype)}, dtype=dtype)
                self._floats[cast] = self._floats[value]
                self._quantized.add(cast)
                replace_value(value, cast)

    def _round_and_clip(self, before: ir.Node, quotient: ir.Value, zero: ir.Value | None, dtype: ir.DataType) -> ir.Value:
        rounded = self._op(before, "Round", quotient)
        shifted = rounded if zero is None else self._op(before, "Add", rounded, zero)
        limits = np.iinfo(dtype.numpy())
        return self._clip(before, shifted, limits.min, limits.max)

    def _clip(self, before: ir.Node, value: ir.Value, low: float, high: float) -> ir.Value:
        return self._op(before, "Clip", value, self._builder.scalar(low, _FLOAT), self._builder.scalar(high, _FLOAT))

    def _integer(self, before: ir.Node, value: ir.Value | None, *, shape: tuple[int, ...] | None = None) -> ir.Value:
        """Return the float32 tensor of the integers of `value`; a constant is reshaped to `shape`."""
        assert value is not None
        tensor = constant_tensor(value)
        if tensor is not None:
            return self._constant(("integer", value, shape), tensor, lambda: _reshape(tensor, shape), value.name, shape=shape)
        if value not in self._floats:
            self._floats[value] = self._builder.op(before, "Cast", [value], {"to": int(_FLOAT)}, dtype=_FLOAT)
        return self._floats[value]

    def _centered(
        self, before: ir.Node, value: ir.Value | None, zero: ir.Value | None, shape: tuple[int, ...] | None
    ) -> ir.Value:
        """Return `value - zero` in float32; a constant zero point is reshaped to `shape`."""
        assert value is not None
        tensor, zero_tensor = constant_tensor(value), constant_tensor(zero)
        if zero is None or (zero_tensor is not None and not zero_tensor.numpy().any()):
            return self._integer(before, value)
        if tensor is not None and zero_tensor is not None:
            return self._constant(
                ("centered", value, zero, shape),
                tensor,
                lambda: _reshape(tensor, None) - _reshape(zero_tensor, shape),
                value.name,
            )
        return self._op(before, "Sub", self._integer(before, value), self._zero(before, zero, shape))

    def _zero(self, before: ir.Node, zero: ir.Value, shape: tuple[int, ...] | None) -> ir.Value:
        return self._integer(before, zero, shape=shape if _size(zero) > 1 else None)

    def _scale(self, before: ir.Node, scale: ir.Value | None, shape: tuple[int, ...] | None) -> ir.Value:
        """Return a scale; a constant of several is reshaped to `shape`."""
        assert scale is not None
        tensor = constant_tensor(scale)
        if tensor is None or tensor.size == 1 or shape is None:
            return scale
        return self._builder.constant(_reshape(tensor, shape), _FLOAT)

    def _axis_shape(self, node: ir.Node, x: ir.Value) -> tuple[int, ...] | None:
        """Return the shape to which a scale per channel of `node` broadcasts; None for one scale."""
        rank = rank_of(x)
        if rank is None or _size(node.inputs[1]) == 1:
            return None
        axis = int_attribute(node, "axis", 1) % rank
        return (-1, *[1] * (rank - axis - 1))

    def _constant(
        self,
        key: tuple[object, ...],
        source: ir.TensorProtocol,
        evaluate: Callable[[], Array],
        name: str | None,
        *,
        shape: tuple[int, ...] | None = None,
    ) -> ir.Value:
        """Return a float32 initializer of the shape of `source`, or of the reshaped constant, evaluated on each read."""
        if key not in self._constants:
            new_name = self._builder.names.allocate(f"{name or 'constant'}_float")
            sizes = ir.Shape(source.shape.numpy() if shape is None else _reshape(source, shape).shape)
            tensor = ir.LazyTensor(
                lambda: ir.Tensor(np.ascontiguousarray(evaluate(), np.float32), name=new_name), _FLOAT, sizes, name=new_name
            )
            value = ir.Value(name=new_name, const_value=tensor, type=ir.TensorType(_FLOAT), shape=sizes)
            self._graph.register_initializer(value)
            self._types[value] = _FLOAT
            self._constants[key] = value
        return self._constants[key]


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _size(value: ir.Value | None) -> int:
    """Return the number of elements of a constant; 1 for a computed scale or zero point, which is a scalar."""
    tensor = constant_tensor(value)
    return 1 if tensor is None else int(tensor.size)


def _reshape(tensor: ir.TensorProtocol, shape: tuple[int, ...] | None) -> Array:
    array = tensor.numpy().astype(np.float32)
    return array if shape is None else array.reshape(shape)


def _dequantize(tensors: list[ir.TensorProtocol | None], shape: tuple[int, ...] | None) -> Array:
    """Return (x - zero point) * scale in float32, as DequantizeLinear computes it."""
    x, scale, zero = tensors
    assert x is not None
    assert scale is not None
    integers = _reshape(x, None)
    if zero is not None:
        integers = integers - _reshape(zero, shape if zero.size > 1 else None)
    result: Array = integers * _reshape(scale, shape if scale.size > 1 else None)
    return result
