"""The residual stream of a transformer: the values through which everything passes, and the blocks between them.

A cut is a value without which no later value of the stream can be computed: the input and the output of each attention and of
each MLP, and of normalizations that are not bypassed. They are found by a sweep over the nodes in topological order that keeps
the values which later nodes still read; where one value is left, it is a cut. So the ops inside a block do not matter.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ryzen_compile.ir.analysis.element_types import element_types, is_standard_op

_ATTENTION_OPS = frozenset({"Attention", "MultiHeadAttention", "GroupQueryAttention", "TRT_Attention", "Softmax"})
"""Ops that stand for an attention; a Softmax does where it normalizes the scores between two products."""
_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "MatMulNBits", "MatMulInteger"})
_SHAPE_OPS = frozenset({"Shape", "Size"})
_FLOAT_TYPES = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


@dataclass(frozen=True, kw_only=True)
class TransformerBlock:
    """A block: an attention and, after it, an MLP."""

    input: ir.Value
    """The value that the attention reads, through a normalization or not."""
    middle: ir.Value
    """The value between attention and MLP, after the normalization if it is not bypassed."""
    output: ir.Value
    """The value after the MLP, after the normalization if it is not bypassed."""
    attention: ir.Node
    """The node of the attention, or the Softmax in it."""
    nodes: frozenset[ir.Node]
    """The nodes that compute `output` from `input`, with those that compute keys and values for a cache."""


def find_blocks(model: ir.Model) -> list[TransformerBlock]:
    """Return the blocks of the longest residual stream of the main graph, in order; empty if there is none.

    The graph must be folded: constants and shape arithmetic of exporters hide the cuts.
    """
    nodes = list(model.graph)
    types = element_types(model)
    floats = {value for value, dtype in types.items() if dtype in _FLOAT_TYPES}
    attentions = [node for node in nodes if _is_attention(node)]
    if not attentions:
        return []
    best: list[TransformerBlock] = []
    for start in _ancestors(attentions[0], nodes, floats):
        blocks = list(_blocks(_cuts(start, nodes, floats)))
        if len(blocks) > len(best):
            best = blocks
        if len(best) == len(attentions):
            break
    return best


@dataclass(frozen=True, kw_only=True)
class _Segment:
    """The nodes between two cuts."""

    start: ir.Value
    end: ir.Value
    nodes: Sequence[ir.Node]

    @property
    def attention(self) -> ir.Node | None:
        """The only attention of the segment; None if it has none or several."""
        found = [node for node in self.nodes if _is_attention(node)]
        return found[0] if len(found) == 1 else None

    @property
    def has_product(self) -> bool:
        """Whether it multiplies matrices."""
        return any(node.op_type in _PRODUCTS for node in self.nodes)


def _is_attention(node: ir.Node) -> bool:
    if node.op_type not in _ATTENTION_OPS:
        return False
    if node.op_type != "Softmax":
        return True
    return is_standard_op(node) and any(user.op_type == "MatMul" for user in _users_behind_casts(node.outputs[0]))


def _users_behind_casts(value: ir.Value) -> Iterator[ir.Node]:
    """Yield the nodes that read `value`, directly or behind nodes that keep its elements or their order."""
    for user, _ in value.uses():
        if user.op_type in ("Cast", "Dropout", "Identity", "Reshape", "Where"):
            yield from _users_behind_casts(user.outputs[0])
        else:
            yield user


def _ancestors(node: ir.Node, nodes: Sequence[ir.Node], floats: Collection[ir.Value]) -> list[ir.Value]:
    """Return the float values with nodes from which `node` is computed, in topological order."""
    found: set[ir.Node] = set()
    pending = [node]
    while pending:
        for value in pending.pop().inputs:
            producer = value.producer() if value is not None else None
            if producer is not None and producer not in found:
                found.add(producer)
                pending.append(producer)
    return [value for member in nodes if member in found for value in member.outputs if value in floats]


def _cuts(start: ir.Value, nodes: Sequence[ir.Node], floats: Collection[ir.Value]) -> list[_Segment]:
    """Return the segments between the cuts of what is computed from `start`."""
    remaining = {start: sum(user.op_type not in _SHAPE_OPS for user, _ in start.uses())}
    segments, passed, last = [], list[ir.Node](), start
    for node in nodes:
        reads = [value for value in node.inputs if value is not None and value in remaining]
        if not reads or node.op_type in _SHAPE_OPS:
            continue
        passed.append(node)
        for value in reads:
            remaining[value] -= 1
            if not remaining[value]:
                del remaining[value]
        for value in node.outputs:
            uses = sum(user.op_type not in _SHAPE_OPS for user, _ in value.uses())
            if uses:
                remaining[value] = uses
        left = [*remaining] or [value for value in node.outputs if value.is_graph_output()]
        if len(left) == 1:
            (value,) = left
            if value in floats and value in node.outputs:
                segments.append(_Segment(start=last, end=value, nodes=tuple(passed)))
                last, passed = value, []
    return segments


def _blocks(segments: Sequence[_Segment]) -> Iterator[TransformerBlock]:
    """Yield the blocks; those of a model whose MLP runs beside the attention have no segment of the MLP."""
    starts = [index for index, segment in enumerate(segments) if segment.attention is not None]
    middles = [_skip_normalizations(segments, index) for index in starts]
    is_parallel = any(middle + 1 == start for middle, start in zip(middles, starts[1:], strict=False))
    for start, middle in zip(starts, middles, strict=True):
        attention = segments[start].attention
        if attention is None:
            continue
        middle = start if is_parallel else middle
        end = middle
        if not is_parallel and middle + 1 < len(segments):
            end = min(middle + 1 + (middle - start), len(segments) - 1)  # as many normalizations as after the attention
        yield TransformerBlock(
            input=segments[start].start,
            middle=segments[middle].end,
            output=segments[end].end,
            attention=attention,
            nodes=frozenset(node for segment in segments[start : end + 1] for node in segment.nodes),
        )


def _skip_normalizations(segments: Sequence[_Segment], index: int) -> int:
    """Return the index of the last segment after that at `index` before one with a product, or `index`."""
    while index + 1 < len(segments) and not segments[index + 1].has_product:
        index += 1
    return index
