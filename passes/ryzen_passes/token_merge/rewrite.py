"""Insertion of merge steps between the attention and the MLP of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ryzen_compile.ir.analysis.constants import int_attribute
from ryzen_compile.ir.edit.builder import ModelInfo, NodeBuilder, next_node, remove_dead_nodes
from ryzen_compile.ir.edit.transaction import transaction
from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.ir.patterns import PatternNotMatched
from ryzen_compile.registry import find_op
from ryzen_compile.spec.passes import Change, Refusal
from ryzen_passes.attention_fusion import MASK_FILL_THRESHOLD, AttentionMatcher, Mask
from ryzen_passes.opset import raise_opset, standard_opset
from ryzen_passes.residual_stream import find_blocks
from ryzen_passes.symbolic_shapes import infer_symbolic_shapes
from ryzen_passes.token_merge.padding import find_padding_mask
from ryzen_passes.token_merge.token_axes import TokenAxes, find_token_axes, outside_readers, reshape_target

_INT64, _INT32, _FLOAT, _BOOL = ir.DataType.INT64, ir.DataType.INT32, ir.DataType.FLOAT, ir.DataType.BOOL
_DENOMINATOR = 1 << 16
"""Shares of the tokens are multiples of its reciprocal, so that integers compute the number of tokens, rounded to nearest."""
_OPSET = 18
"""The lowest opset of the references of the ops."""
_OPS = ("TokenMatch", "TokenAssign", "TokenMerge", "TokenUnmerge")


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """How many tokens the steps merge, and which they never merge."""

    shares: tuple[float, ...]
    """The share of the tokens of the sequence that each block merges, in [0, 1)."""
    protect: int
    """The number of tokens at the start that are never merged, such as a class token."""


def merge_tokens(model: ir.Model, config: MergeConfig) -> Change | Refusal:
    """Insert the merge steps into `model` in place; on a refusal `model` is unchanged."""
    return transaction(model, lambda copy: _StepInserter(copy, config).rewrite())


class _StepInserter:
    """Inserts the steps into one model."""

    def __init__(self, model: ir.Model, config: MergeConfig) -> None:
        self.model, self.config = model, config
        self.interface = interface_of(model)
        infer_symbolic_shapes(model, self.interface)
        self.info = ModelInfo(model)
        self.writer = NodeBuilder(model.graph, self.info)
        self.blocks = find_blocks(model)
        self.dead: list[ir.Node] = []
        self.changed: list[str] = []

    def rewrite(self) -> Change:
        """Insert the steps. Raises PatternNotMatched if the model is no encoder that they fit."""
        graph_name = self.model.graph.name or "the graph"
        if (reason := raise_opset(self.model, _OPSET)) is not None:
            raise PatternNotMatched(reason, graph_name, f"export the model at opset {_OPSET}")
        if self.interface.states:
            raise PatternNotMatched("it is a decoder with caches, and a merged token has no place in a cache", graph_name)
        blocks, shares = self.blocks, self.config.shares
        first = next(index for index, share in enumerate(shares) if share > 0)
        start, end = blocks[first].middle, blocks[-1].output
        if self.info.shapes.rank(start) != 3:
            raise PatternNotMatched("the residual stream is not (batch, tokens, features)", start)
        masks = {block.attention: self._masks(block.attention) for block in blocks[first:]}
        nodes = [node for node in self.model.graph if any(node in block.nodes for block in blocks[first:])]
        nodes = nodes[nodes.index(_producer(start)) + 1 :]
        axes = find_token_axes(start, nodes, self.info.shapes)
        if used := outside_readers(axes.keys() - {end}, {*nodes}):
            raise PatternNotMatched("a value inside a block is also used outside of the blocks", used[0][0])
        padding = find_padding_mask(
            self.model, self.interface, [mask for found in masks.values() for mask in found], self.info.shapes
        )

        self._rewrite_reshapes(nodes, axes)
        for value in axes.keys() - {start, end}:
            value.shape = None
        tokens, size = self._token_count(start), self._initial_size(start, padding)
        targets = []
        for index, (block, share) in enumerate(zip(blocks[first:], shares[first:], strict=True)):
            if index:
                self._set_sizes(block.attention, size)
            if share > 0:
                size, target = self._insert_step(block.middle, size, tokens, share)
                targets.append(target)
        self._restore(end, targets)
        for name in _OPS:
            op = find_op(name)
            op.add_to(self.model)
            self.model.functions[op.ir_function().identifier()].opset_imports[""] = standard_opset(self.model)
        return Change(
            inserted=tuple(self.writer.inserted),
            removed=tuple(remove_dead_nodes([node for node in self.dead if node.graph is not None])),
            changed=tuple(self.changed),
            summary=f"tokens are merged in {len(targets)} of {len(blocks)} blocks",
        )

    # Attention

    def _masks(self, attention: ir.Node) -> tuple[Mask, ...]:
        """Return the masks of an attention. Raises PatternNotMatched if it cannot take the sizes of tokens instead."""
        if attention.op_type == "Softmax":
            match = AttentionMatcher(self.info.shapes).match(attention)
            if match is None:
                raise PatternNotMatched("a Softmax is not that of an attention", attention)
            if match.rank != 4:
                raise PatternNotMatched("the attention has no axis of heads", attention)
            return tuple(match.masks)
        if attention.op_type != "Attention" or attention.domain not in ("", "ai.onnx"):
            raise PatternNotMatched(
                f"the attention is a {attention.op_type}", attention, "run token-merge before the pass that fuses attention"
            )
        if int_attribute(attention, "is_causal", 0) or len(attention.inputs) > 4:
            raise PatternNotMatched("the attention is causal", attention)
        mask = attention.inputs[3] if len(attention.inputs) > 3 else None
        if mask is None:
            return ()
        is_bool = self.info.types.get(mask) == _BOOL
        return (Mask(mask, float("-inf")) if is_bool else Mask(mask),)

    def _set_sizes(self, attention: ir.Node, size: ir.Value) -> None:
        """Replace the masks of an attention by the logarithm of the sizes of its keys (proportional attention)."""
        op = self.writer.op
        scores = attention.inputs[0]
        if scores is None:
            raise PatternNotMatched("an attention without scores", attention)
        dtype = self.info.types[scores]
        if attention.op_type == "Attention":
            mask = self._log_size(attention, size, dtype)
            rows = op(attention, "Shape", [scores], {"start": -2, "end": -1}, dtype=_INT64)
            target = op(attention, "Concat", [rows, self.writer.int64_vector(1)], {"axis": 0})
            mask = op(attention, "Expand", [mask, target])
            if len(attention.inputs) > 3 and (old := attention.inputs[3]) is not None and old.producer() is not None:
                self.dead.append(_producer(old))
            attention.resize_inputs(4)
            attention.replace_input_with(3, mask)
        else:
            self._remove_masks(scores)
            scores = attention.inputs[0]
            mask = self._log_size(attention, size, dtype)
            attention.replace_input_with(0, op(attention, "Add", [scores, mask], dtype=dtype))
        self.changed.append(attention.name or attention.op_type)

    def _remove_masks(self, value: ir.Value) -> None:
        """Let the readers of masked scores read the scores."""
        matcher = AttentionMatcher(self.info.shapes)
        while (node := _producer(value)).op_type not in ("MatMul", "FusedMatMul"):
            scores = next(each for each in node.inputs if each is not None and matcher.comes_from_matmul(each))
            if node.op_type in ("Add", "Where"):
                value.replace_all_uses_with(scores)
                self.dead.append(node)
            value = scores

    def _log_size(self, before: ir.Node, size: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Return the logarithm of sizes as (batch, 1, 1, tokens); a large negative number for padding."""
        op, scalar = self.writer.op, self.writer.scalar
        log = op(before, "Log", [op(before, "Max", [size, scalar(1.0, _FLOAT)])])
        is_token = op(before, "Greater", [size, scalar(0.0, _FLOAT)], dtype=_BOOL)
        mask = op(before, "Where", [is_token, log, scalar(MASK_FILL_THRESHOLD, _FLOAT)], dtype=_FLOAT)
        mask = op(before, "Unsqueeze", [mask, self.writer.int64_vector(1, 2)])
        return mask if dtype == _FLOAT else op(before, "Cast", [mask], {"to": int(dtype)}, dtype=dtype)

    # Shapes

    def _rewrite_reshapes(self, nodes: Sequence[ir.Node], axes: TokenAxes) -> None:
        """Give the Reshapes of tokens constant targets that copy the number of tokens."""
        for node in nodes:
            if node.op_type == "Reshape" and node.outputs[0] in axes:
                old, target = node.inputs[1], self._target(node, axes)
                node.replace_input_with(1, target)
                node.attributes.pop("allowzero", None)
                if old is not None and old.producer() is not None:
                    self.dead.append(_producer(old))

    def _target(self, reshape: ir.Node, axes: TokenAxes) -> ir.Value:
        """Return the target of a Reshape of tokens, int64 [rank]."""
        op, source = self.writer.op, reshape.inputs[0]
        sizes = reshape_target(reshape, axes, self.info.shapes)
        if None not in sizes or source is None:
            return self.writer.int64_vector(*(size or 0 for size in sizes))
        (axis,) = axes[source]
        count = op(reshape, "Shape", [source], {"start": axis, "end": axis + 1}, dtype=_INT64)
        parts = [count if size is None else self.writer.int64_vector(size) for size in sizes]
        return op(reshape, "Concat", parts, {"axis": 0}, dtype=_INT64)

    def _token_count(self, stream: ir.Value) -> ir.Value:
        """Return the number of tokens of the sequence, int64 [1]."""
        return self.writer.op(_next(stream), "Shape", [stream], {"start": 1, "end": 2}, dtype=_INT64)

    def _initial_size(self, stream: ir.Value, padding: tuple[ir.Value, int] | None) -> ir.Value:
        """Return 1 for each token and 0 for padding, (batch, tokens) float32."""
        op, before = self.writer.op, _next(stream)
        if padding is None:
            shape = op(before, "Shape", [stream], {"start": 0, "end": 2}, dtype=_INT64)
            return op(before, "Expand", [self.writer.scalar(1.0, _FLOAT), shape], dtype=_FLOAT)
        mask, marks = padding
        boolean = op(before, "Cast", [mask], {"to": int(_BOOL)}, dtype=_BOOL)
        boolean = op(before, "Not", [boolean], dtype=_BOOL) if marks else boolean
        return op(before, "Cast", [boolean], {"to": int(_FLOAT)}, dtype=_FLOAT)

    # Steps

    def _insert_step(self, stream: ir.Value, size: ir.Value, tokens: ir.Value, share: float) -> tuple[ir.Value, ir.Value]:
        """Merge a share of the tokens of the sequence in `stream`; return the sizes and the slot of each token."""
        op, integers = self.writer.op, self.writer.int64_vector
        readers = [(node, index) for node, index in stream.uses() if node.op_type != "Shape"]
        nodes = {node for node, _ in readers}
        before = next(node for node in self.model.graph if node in nodes)
        protect = self.config.protect

        def arithmetic(op_type: str, left: ir.Value, right: int | ir.Value) -> ir.Value:
            return op(before, op_type, [left, integers(right) if isinstance(right, int) else right], dtype=_INT64)

        def indices(start: int, count: ir.Value, step: int) -> ir.Value:
            """Return start, start + step, ... as (batch, count) int32."""
            scalar_count = op(before, "Squeeze", [count], dtype=_INT64)
            numbers = op(before, "Range", [self.writer.scalar(0, _INT64), scalar_count, self.writer.scalar(1, _INT64)])
            numbers = arithmetic("Add", arithmetic("Mul", numbers, step), start)
            row = op(before, "Cast", [numbers], {"to": int(_INT32)}, dtype=_INT32)
            batch = op(before, "Shape", [stream], {"start": 0, "end": 1}, dtype=_INT64)
            return op(before, "Expand", [row, op(before, "Concat", [batch, count], {"axis": 0})])

        present = op(before, "Shape", [stream], {"start": 1, "end": 2}, dtype=_INT64)
        free = arithmetic("Max", arithmetic("Sub", present, protect), 0)
        pairs = arithmetic("Div", free, 2)
        scaled = arithmetic("Add", arithmetic("Mul", tokens, round(share * _DENOMINATOR)), _DENOMINATOR // 2)
        removed = arithmetic("Min", arithmetic("Div", scaled, _DENOMINATOR), pairs)
        left = arithmetic("Sub", present, removed)
        slots = op(before, "Expand", [self.writer.scalar(0, _INT32), left])
        a = indices(protect + 1, arithmetic("Max", pairs, 1), 2)
        b = indices(protect, arithmetic("Max", arithmetic("Sub", free, pairs), 1), 2)
        partner, similarity = self._node(before, "TokenMatch", [stream, size, a, b], (_INT32, _FLOAT))
        (target,) = self._node(before, "TokenAssign", [size, a, partner, similarity, slots], (_INT32,))
        dtype = self.info.types[stream]
        merged, new_size = self._node(before, "TokenMerge", [stream, size, target, slots], (dtype, _FLOAT))
        for node, index in readers:
            node.replace_input_with(index, merged)
        return new_size, target

    def _restore(self, stream: ir.Value, targets: Sequence[ir.Value]) -> None:
        """Let the readers of the last block's output read one row for each token of the sequence."""
        graph, op, readers = self.model.graph, self.writer.op, list(stream.uses())
        end = ir.node("Identity", [stream])
        graph.insert_after(_producer(stream), end)
        slot = targets[0]
        for target in targets[1:]:
            slot = op(end, "GatherElements", [target, slot], {"axis": 1}, dtype=_INT32)
        (restored,) = self._node(end, "TokenUnmerge", [stream, slot], (self.info.types[stream],))
        graph.remove(end, safe=True)
        for node, index in readers:
            node.replace_input_with(index, restored)
        restored.shape, stream.shape = stream.shape, None
        for index, output in enumerate(graph.outputs):
            if output is stream:
                restored.name, stream.name = stream.name, self.info.names.allocate(f"{stream.name}_merged")
                graph.outputs[index] = restored

    def _node(
        self, before: ir.Node, name: str, inputs: Sequence[ir.Value], dtypes: Sequence[ir.DataType]
    ) -> Sequence[ir.Value]:
        op = find_op(name)
        node_name = self.info.names.allocate(f"token_merge_{name}")
        node = ir.node(name, inputs, op.node_attributes({}), domain=op.domain, num_outputs=len(dtypes), name=node_name)
        return self.writer.insert_node(before, node, dtypes)


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    if node is None:
        raise PatternNotMatched("a value without a node that computes it", value)
    return node


def _next(value: ir.Value) -> ir.Node:
    """Return the node after the one that computes `value`."""
    node = _producer(value)
    return next_node(node.graph, node)  # type: ignore[arg-type]
