"""Legalising ONNX Attention for TensorRT: as TRT_Attention where that says the same, else in other ops.

What TensorRT's parser refuses is rewritten: past and present, 3-D inputs, a mask beside is_causal, a softmax in another
precision. What it ignores in silence becomes what it reads: nonpad_kv_seqlen. What no attention of TensorRT computes
(soft-capping, windows, the scores as an output, values of another width than the keys) is written out in MatMul and Softmax.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.analysis.sizes import attribute
from ryzen_compile.ir.edit.builder import Known, Writer, remove_dead, take_over
from ryzen_compile.spec.passes import Change, Refusal
from ryzen_passes.attention.decompose import Expander
from ryzen_passes.attention.masks import Mask, Masks
from ryzen_passes.attention.match import Matcher
from ryzen_passes.opset import raise_opset, standard_opset
from ryzen_plugins.trt_attention import TRT_ATTENTION
from ryzen_plugins.trt_attention.reference import OPSET

_LENGTHS_NEED = 8
"""Kernels that read lengths take head sizes that are a multiple of this (36 was seen to fail)."""


def legalise(known: Known, change: Change, *, strict: bool = False) -> Change | Refusal:
    """Let every Attention of the model build on TensorRT, and add to `change` what that took.

    With `strict` those for which there is no fused kernel do not build.
    """
    model = known.model
    graphs = (model.graph, *model.graph.subgraphs())
    listed = [(graph, [node for node in graph if node.op_type == "Attention" and node.domain == ""]) for graph in graphs]
    found = [(graph, nodes) for graph, nodes in listed if nodes]
    if not found:
        return change
    if (reason := raise_opset(model, OPSET)) is not None:
        return Refusal(says=f"TRT_Attention needs opset {OPSET}: {reason}", where=found[0][1][0].name or "Attention")
    inserted, removed, notes = [*change.inserted], [*change.removed], [*change.notes]
    changed: list[str] = []
    written_out: list[str] = []
    for graph, nodes in found:
        legaliser = Legaliser(graph, known, strict=strict)
        for node in nodes:
            node.name = node.name or known.names.new("attention")
            why = legaliser.put(node)
            if strict and why is not None:
                hint = "leave `strict` out to have it written in other ops"
                return Refusal(says=f"TensorRT has no fused attention for it: {why}", where=node.name, hint=hint)
            (changed if why is None else written_out).append(node.name)
            if why is not None:
                notes.append(f"{node.name}: written out in other ops: {why}")
            removed += remove_dead([node])[1:]
        inserted += legaliser.write.written
    if changed:
        TRT_ATTENTION.add_to(model)
        # A function and the model that holds it must be of one opset; newer ones add to Attention and change nothing.
        model.functions[TRT_ATTENTION.function().identifier()].opset_imports[""] = standard_opset(model)
    said = [f"{len(changed)} made TRT_Attention"] * bool(changed) + [f"{len(written_out)} written out"] * bool(written_out)
    passing = {*inserted} & {*removed}
    return dataclasses.replace(
        change,
        inserted=tuple(name for name in inserted if name not in passing),
        removed=tuple(name for name in (*removed, *written_out) if name not in passing),
        changed=tuple(changed),
        says=", ".join([*([change.says] if change else []), *said]),
        notes=tuple(notes),
    )


@dataclass
class Call:
    """What an Attention is given, as four-dimensional tensors."""

    node: ir.Node
    dtype: ir.DataType
    query: ir.Value
    """(B, H, S, D)"""
    key: ir.Value
    """(B, G, N, D), the past before the new."""
    value: ir.Value
    fresh: ir.Value
    """(B, G, new, D): the new keys alone."""
    past: ir.Value | None
    masks: tuple[Mask, ...] = ()
    lengths: ir.Value | None = None
    """(B,): how many keys there are."""
    causal: bool = False
    flat: bool = False
    """Whether the node itself takes and gives (B, S, H*D)."""

    def output(self, at: int) -> ir.Value | None:
        """Return output `at` where something reads it."""
        value = self.node.outputs[at] if at < len(self.node.outputs) else None
        return value if value is not None and value.name and (value.uses() or value.is_graph_output()) else None


class Legaliser:
    """Rewrites the attentions of one graph."""

    def __init__(self, graph: ir.Graph, known: Known, *, strict: bool = False) -> None:
        self.strict = strict
        self.matcher = Matcher(known.sizes)
        self.sizes, self.types = known.sizes, known.types
        self.write = Writer(graph, known)
        self.masks = Masks(self.write, self.sizes)
        self._orders: dict[tuple[object, ...], Mask] = {}

    def put(self, node: ir.Node) -> str | None:
        """Put ops that build in the place of `node`; return why it had to be written out, or None where it had not."""
        call = self._read(node)
        for at, whole in ((1, call.key), (2, call.value)):
            present = call.output(at)
            if present is not None:
                take_over(present, self.write.op(node, "Identity", [whole]))
        why = self._beyond(call)
        if why is None:
            output = self._attend(call)
        else:
            self._all_as_masks(call)
            expander = Expander(self.write, self.masks, self.sizes)
            output, weights = expander.write_out(call.node, self._scaled(call), call.key, call.value, call.masks, call.dtype)
            scores = call.output(3)
            if scores is not None:
                take_over(scores, weights)
        if call.flat:
            rows = self.write.op(node, "Transpose", [output], {"perm": (0, 2, 1, 3)})
            output = self.write.op(node, "Reshape", [rows, self.write.integers(0, 0, -1)])
        take_over(node.outputs[0], output)
        return why

    def _read(self, node: ir.Node) -> Call:
        inputs = [*node.inputs, *[None] * (7 - len(node.inputs))]
        query, key, value, mask, past_key, past_value, lengths = inputs[:7]
        if query is None or key is None or value is None:
            raise ValueError(f"`{node.name}` lacks a query, a key or a value")
        dtype = self.types.get(query, ir.DataType.FLOAT)
        flat = self.sizes.rank(query) == 3 or (self.sizes.rank(query) is None and "q_num_heads" in node.attributes)
        if flat:
            heads, groups = attribute(node, "q_num_heads", 1), attribute(node, "kv_num_heads", 1)
            query, key, value = (
                self._heads(node, query, heads),
                self._heads(node, key, groups),
                self._heads(node, value, groups),
            )
        else:
            few_keys, few_values = self.matcher.before_repeat(key), self.matcher.before_repeat(value)
            if few_keys is not None and few_values is not None and past_key is None:
                key, value = few_keys, few_values
        fresh = key
        if past_key is not None and past_value is not None:
            key = self.write.op(node, "Concat", [past_key, key], {"axis": 2})
            value = self.write.op(node, "Concat", [past_value, value], {"axis": 2})
        masks: tuple[Mask, ...] = ()
        if mask is not None:
            one = Mask(mask, float("-inf")) if self.types.get(mask) == ir.DataType.BOOL else Mask(mask)
            masks = () if self.masks.is_nothing(one) else (self._whole(one, key, node),)
        causal = bool(attribute(node, "is_causal", 0))
        return Call(node, dtype, query, key, value, fresh, past_key, masks, lengths, causal, flat)

    def _heads(self, node: ir.Node, value: ir.Value, heads: int) -> ir.Value:
        """Return (B, H, S, D) of (B, S, H*D)."""
        apart = self.write.op(node, "Reshape", [value, self.write.integers(0, 0, heads, -1)])
        return self.write.op(node, "Transpose", [apart], {"perm": (0, 2, 1, 3)})

    def _whole(self, mask: Mask, key: ir.Value, node: ir.Node) -> Mask:
        """Return `mask` with a column for each key: ONNX masks the keys for which there is none."""
        have, keys = self.sizes.dims(mask.value), self.sizes.dims(key)
        if have is None or keys is None or have[-1] == keys[2] or not isinstance(have[-1], int) or not isinstance(keys[2], int):
            return mask
        pads = self.write.integers(*[0] * (2 * len(have) - 1), keys[2] - have[-1])
        out = -np.inf if mask.fill is None else 0.0
        dtype = self.types.get(mask.value, ir.DataType.FLOAT)
        return dataclasses.replace(mask, value=self.write.op(node, "Pad", [mask.value, pads, self.write.number(out, dtype)]))

    def _beyond(self, call: Call) -> str | None:
        """Return what this attention does that none of TensorRT does, or None."""
        node = call.node
        if call.output(3) is not None:
            return "its scores are an output"
        cap = node.attributes.get("softcap")
        if cap is not None and cap.as_float():
            return "its scores are soft-capped"
        if any(attribute(node, side, -1) >= 0 for side in ("left_window_size", "right_window_size")):
            return "it attends in a window"
        query, value = self.sizes.dims(call.query), self.sizes.dims(call.value)
        widths = (query[3], value[3]) if query is not None and value is not None else (0, 0)
        if widths[0] != widths[1] and all(isinstance(width, int) for width in widths):
            return f"its values are {widths[1]} wide and its keys {widths[0]}"
        return None

    def _scaled(self, call: Call) -> ir.Value:
        """Return the query times the scale of the scores."""
        scale = call.node.attributes.get("scale")
        dims = self.sizes.dims(call.query)
        width = dims[3] if dims is not None else None
        if scale is not None or isinstance(width, int):
            factor = scale.as_float() if scale is not None else 1 / float(width) ** 0.5  # type: ignore[arg-type]
            if factor == 1.0:
                return call.query
            number = self.write.number(factor, call.dtype)
            return self.write.op(call.node, "Mul", [call.query, number], shape=call.query.shape)
        size = self.write.op(call.node, "Shape", [call.query], {"start": 3, "end": 4}, dtype=ir.DataType.INT64)
        number = self.write.op(call.node, "Cast", [size], {"to": int(call.dtype)}, dtype=call.dtype)
        return self.write.op(call.node, "Div", [call.query, self.write.op(call.node, "Sqrt", [number])])

    def _attend(self, call: Call) -> ir.Value:
        """Write a TRT_Attention, and zero in its rows that see no key."""
        kind = self._causal_kind(call)
        call.causal = call.causal and kind == "none"
        if not self._reads_lengths(call):
            self._all_as_masks(call)
        node = call.node
        visible = self.masks.visible(call.masks, node)
        mask = None
        if call.masks:
            mask = self.masks.for_rows_of(call.query, self.masks.finite(call.masks, call.dtype, node), node)
            mask = self._four_axes(mask, node)
        output = self.write.op(
            node,
            TRT_ATTENTION.name,
            [self._scaled(call), call.key, call.value, mask, None, call.lengths],
            {"causal_kind": kind, "TRT_decomposable": int(not self.strict)},
            domain=TRT_ATTENTION.domain,
            name=node.name,
            shape=None if call.flat else node.outputs[0].shape,
        )
        if visible is None:
            return output
        zero = self.write.number(0.0, call.dtype)
        return self.write.op(node, "Where", [visible, output, zero], dtype=call.dtype, shape=output.shape)

    def _causal_kind(self, call: Call) -> str:
        """Return the word of TensorRT for the causality of `call`, or "none" where there is no such word for it."""
        if not call.causal or call.masks or call.lengths is not None:
            return "none"
        if call.past is None:
            return "upper_left"
        # ONNX puts the first query behind the past, TensorRT the last one at the last key.
        query, fresh = self.sizes.dims(call.query), self.sizes.dims(call.fresh)
        return "lower_right" if query is not None and fresh is not None and query[2] == fresh[2] else "none"

    def _reads_lengths(self, call: Call) -> bool:
        """Whether lengths can stay lengths: alone, for a width that has a kernel, and causal only for one query."""
        if call.lengths is None or call.masks:
            return call.lengths is None and not call.causal
        dims = self.sizes.dims(call.query)
        if dims is None or not isinstance(dims[3], int) or dims[3] % _LENGTHS_NEED:
            return False
        call.causal = call.causal and dims[2] != 1
        return not call.causal

    def _all_as_masks(self, call: Call) -> None:
        """Turn lengths and order into conditions."""
        if call.lengths is not None or call.causal or self._window(call) != (-1, -1):
            call.masks = (*call.masks, self._order(call))
        call.lengths, call.causal = None, False

    def _window(self, call: Call) -> tuple[int, int]:
        return attribute(call.node, "left_window_size", -1), attribute(call.node, "right_window_size", -1)

    def _order(self, call: Call) -> Mask:
        """Return the condition under which a query sees a key, by lengths, causality and window; written once for all alike."""
        query, key = self.sizes.dims(call.query), self.sizes.dims(call.key)
        same = (query[2] if query else call.query, key[2] if key else call.key)
        marks = (call.causal, self._window(call), call.lengths, call.past is None)
        if (same, marks) not in self._orders:
            self._orders[same, marks] = Mask(self._write_order(call), float("-inf"))
        return self._orders[same, marks]

    def _write_order(self, call: Call) -> ir.Value:
        node, columns = call.node, self._count(call.node, call.key)
        lengths = call.lengths
        terms: list[ir.Value] = []
        if lengths is not None:
            lengths = self.write.op(node, "Unsqueeze", [lengths, self.write.integers(1, 2, 3)])
            terms.append(self.write.op(node, "Less", [columns, lengths], dtype=ir.DataType.BOOL))
        left, right = self._window(call)
        if call.causal:
            right = 0
        place = self._place(call, lengths) if left >= 0 or right >= 0 else None
        for reach, way, op in ((right, 1, "LessOrEqual"), (left, -1, "GreaterOrEqual")):
            if place is not None and reach >= 0:
                edge = self.write.op(node, "Add", [place, self.write.constant(np.array(way * reach), ir.DataType.INT64)])
                terms.append(self.write.op(node, op, [columns, edge], dtype=ir.DataType.BOOL))
        seen = terms[0]
        for term in terms[1:]:
            seen = self.write.op(node, "And", [seen, term])
        return seen

    def _place(self, call: Call, lengths: ir.Value | None) -> ir.Value:
        """Return the key that each query stands at, (S, 1) or (B, 1, S, 1): behind the past, or at the end of the lengths."""
        rows = self.write.op(call.node, "Unsqueeze", [self._count(call.node, call.query), self.write.integers(-1)])
        if call.past is not None:
            return self.write.op(call.node, "Add", [rows, self._size(call.node, call.past)])
        if lengths is None:
            return rows
        before = self.write.op(call.node, "Sub", [lengths, self._size(call.node, call.query)])
        return self.write.op(call.node, "Add", [rows, before])

    def _size(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """Return the number of rows of (B, H, rows, D), as a vector of one."""
        return self.write.op(node, "Shape", [value], {"start": 2, "end": 3}, dtype=ir.DataType.INT64)

    def _count(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """Return 0, 1, 2, ... for the rows of (B, H, rows, D)."""
        size = self.write.op(node, "Squeeze", [self._size(node, value)])
        ends = [self.write.constant(np.array(number), ir.DataType.INT64) for number in (0, 1)]
        return self.write.op(node, "Range", [ends[0], size, ends[1]], shape=ir.Shape([None]))

    def _four_axes(self, mask: ir.Value, node: ir.Node) -> ir.Value:
        rank = self.sizes.rank(mask)
        if rank is None or rank >= 4:
            return mask
        return self.write.op(node, "Unsqueeze", [mask, self.write.integers(*range(4 - rank))])
