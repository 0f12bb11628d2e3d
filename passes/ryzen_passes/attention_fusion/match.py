"""Match decomposed attention, softmax(cap(scale * Q K^T) + mask) V, in the forms that exporters write."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from ryzen_compile.ir.analysis.constants import constant_scalar, constant_tensor, float_attribute, int_attribute, ints_attribute
from ryzen_compile.ir.analysis.sizes import ShapeInference
from ryzen_compile.ir.patterns import PatternNotMatched
from ryzen_passes.attention_fusion.masks import Mask

MASK_FILL_THRESHOLD = -1e4
"""A score filled with this value or less has no weight in a softmax over scores of ordinary magnitude."""

_MAX_DISTANCE = 12
"""The maximum number of nodes between a softmax and the MatMul of query and key."""
_LAST_TWO_SWAPPED = (0, 1, 3, 2)
_LAST_TO_SECOND = (0, 2, 3, 1)


@dataclass
class AttentionMatch:
    """One decomposed attention: its inputs, its output node, its scale, its soft cap and its masks.

    Dims: B batch, H query heads, S queries, T keys, D head size.
    """

    output_node: ir.Node
    """The last node; its output is (B, H, S, D), or (B, S, D) without a head axis."""
    query: ir.Value
    key: ir.Value
    key_perm: tuple[int, ...] | None
    """The permutation that makes `key` (B, heads, T, D); None if it has that layout."""
    value: ir.Value
    scale: float
    rank: int
    dynamic_scales: list[tuple[str, ir.Value]] = field(default_factory=list)
    """Scalars that scale the query and are only known at run time, as (Mul or Div, value)."""
    masks: list[Mask] = field(default_factory=list)
    is_grouped_query: bool = False
    """Whether several query heads share one key head."""
    softmax_precision: ir.DataType | None = None
    """The type that the softmax computes in, if a Cast of the scores changes it."""
    softcap: float = 0.0
    """The bound of the scores, softcap * tanh(scores / softcap), before the masks; 0: unbounded."""


class AttentionMatcher:
    """Matches decomposed attention in a model."""

    def __init__(self, shapes: ShapeInference) -> None:
        self.shapes = shapes

    def match(self, softmax: ir.Node) -> AttentionMatch | None:
        """Return the attention whose weights `softmax` computes; None if it is no attention.

        Raises PatternNotMatched if it looks like attention but cannot be fused.
        """
        output_node, other_use = self._find_value_matmul(softmax)
        scores = _required_input(softmax, 0)
        if output_node is None or not self.comes_from_matmul(scores):
            self._refuse_sink(softmax)
            return None
        if other_use is not None:
            raise PatternNotMatched("the attention weights have other consumers", other_use)
        trace = _ScoreTrace(self.shapes)
        matmul = trace.trace_to_matmul(scores)
        rank = self.shapes.rank(_required_input(matmul, 0))
        if rank not in (3, 4):
            raise PatternNotMatched(
                "the rank of the query is unknown" if rank is None else f"the query has rank {rank}, not 3 or 4", matmul
            )
        if int_attribute(softmax, "axis", -1) not in (-1, rank - 1):
            raise PatternNotMatched("the softmax axis is not the key axis", softmax)
        query, key, key_perm = self._query_and_key(matmul, trace, rank)
        value = _required_input(output_node, 1)
        if self.shapes.rank(value) != rank:
            raise PatternNotMatched("the values and the query differ in rank", value)
        match = AttentionMatch(
            output_node=output_node,
            query=query,
            key=key,
            key_perm=key_perm,
            value=value,
            scale=trace.scale * (trace.softcap or 1.0),
            rank=rank,
            dynamic_scales=trace.dynamic_scales,
            masks=trace.masks[::-1],
            softmax_precision=trace.softmax_precision,
            softcap=trace.softcap,
        )
        if rank == 4:
            self._strip_repeat_kv(match)
        self._check_broadcast(match)
        return match

    def comes_from_matmul(self, value: ir.Value, max_nodes: int = _MAX_DISTANCE) -> bool:
        """Return whether `value` derives from a MatMul of two non-constant matrices within `max_nodes` nodes of any kind."""
        node = value.producer()
        if node is None or not max_nodes:
            return False
        if node.op_type in ("MatMul", "FusedMatMul"):
            return constant_tensor(_required_input(node, 1)) is None
        operands = [operand for operand in node.inputs[:3] if operand is not None and constant_tensor(operand) is None]
        if node.op_type not in ("Add", "Where", "Max", "Sub"):
            operands = operands[:1]
        return any(self.comes_from_matmul(operand, max_nodes - 1) for operand in operands)

    def _refuse_sink(self, softmax: ir.Node) -> None:
        """Raise PatternNotMatched if `softmax` also runs over an attention sink, whose weight is sliced off (GPT-OSS)."""
        is_sliced = any(use.node.op_type in ("Slice", "Split") for use in softmax.outputs[0].uses())
        node = _required_input(softmax, 0).producer()
        while is_sliced and node is not None and node.op_type in ("Sub", "Cast", "Identity"):
            node = _required_input(node, 0).producer()
        operands = node.inputs if is_sliced and node is not None and node.op_type == "Concat" else ()
        if any(operand is not None and self.comes_from_matmul(operand) for operand in operands):
            raise PatternNotMatched("attention has a sink, a learned score beside those of the keys", node)

    def _find_value_matmul(self, softmax: ir.Node) -> tuple[ir.Node | None, ir.Value | None]:
        """Return the MatMul of weights and values, and a weights tensor with another consumer; None for each if absent."""
        other_use, value = None, softmax.outputs[0]
        while True:
            uses = [use.node for use in value.uses()]
            if value.is_graph_output():
                other_use = value
            guard_output = _nan_guard_output(value, uses)
            if guard_output is not None:
                value = guard_output
                continue
            if len(uses) > 1:
                other_use = value
            matmul = next((node for node in uses if node.op_type == "MatMul" and node.inputs[0] is value), None)
            if matmul is not None:
                return matmul, other_use
            # A Dropout with a third input may be in training mode.
            carriers = [node for node in uses if node.op_type in ("Cast", "Identity", "Dropout") and len(node.inputs) < 3]
            carrier = next(iter(carriers), None)
            if carrier is None:
                return None, other_use
            value = carrier.outputs[0]

    def _query_and_key(
        self, matmul: ir.Node, trace: _ScoreTrace, rank: int
    ) -> tuple[ir.Value, ir.Value, tuple[int, ...] | None]:
        """Return the query, the key, and the permutation that makes the key (B, heads, T, D)."""
        query, key = trace.strip_scale(_required_input(matmul, 0)), trace.strip_scale(_required_input(matmul, 1))
        if self.shapes.rank(key) != rank:
            raise PatternNotMatched("query and key differ in rank", matmul)
        if matmul.op_type == "FusedMatMul":
            if (
                int_attribute(matmul, "transA", 0)
                or int_attribute(matmul, "transBatchA", 0)
                or int_attribute(matmul, "transBatchB", 0)
            ):
                raise PatternNotMatched("the query is transposed", matmul)
            trace.scale *= float_attribute(matmul, "alpha", 1.0)
            if int_attribute(matmul, "transB", 0):
                return query, trace.strip_scale(key), None
        elif matmul.domain != "":
            raise PatternNotMatched(f"the MatMul is of the unsupported domain `{matmul.domain}`", matmul)
        swapped = (0, 2, 1) if rank == 3 else _LAST_TWO_SWAPPED
        node = key.producer()
        if node is not None and node.op_type == "Transpose":
            perm = ints_attribute(node, "perm")
            if perm == swapped:
                return query, trace.strip_scale(_required_input(node, 0)), None
            if perm == _LAST_TO_SECOND:
                return query, trace.strip_scale(_required_input(node, 0)), (0, 2, 1, 3)
        unflattened = self._key_before_flat_transpose(key)
        if unflattened is not None:
            return query, trace.strip_scale(unflattened), None
        return query, key, swapped

    def _key_before_flat_transpose(self, key: ir.Value) -> ir.Value | None:
        """Return K of Reshape(Transpose(Reshape(K, (B*H, T, D))), (B, H, D, T)); None for another form."""
        inner = _input_if_op(key, "Reshape")
        transposed = _input_if_op(inner, "Transpose")
        source = _input_if_op(transposed, "Reshape")
        if inner is None or transposed is None or source is None or self.shapes.rank(source) != 4:
            return None
        perm = ints_attribute(inner.producer(), "perm")  # type: ignore[arg-type]
        source_dims, flat_dims, key_dims = self.shapes.dims(source), self.shapes.dims(transposed), self.shapes.dims(key)
        if source_dims is None or flat_dims is None or key_dims is None or perm != (0, 2, 1):
            return None
        batch, heads, rows, width = source_dims
        return source if flat_dims[1:] == (rows, width) and key_dims == (batch, heads, width, rows) else None

    def _strip_repeat_kv(self, match: AttentionMatch) -> None:
        """Replace keys and values that are repeated for several query heads by the unrepeated ones."""
        if match.key_perm is not None:
            return
        key, value = self.before_repeat_kv(match.key), self.before_repeat_kv(match.value)
        if key is not None and value is not None:
            match.key, match.value, match.is_grouped_query = key, value, True

    def before_repeat_kv(self, repeated: ir.Value) -> ir.Value | None:
        """Return x (B, G, T, D) of Reshape(Expand(Unsqueeze(x, 2), (B, G, n, T, D)), (B, G*n, T, D)); None for another form."""
        expanded = _input_if_op(repeated, "Reshape")
        unsqueezed = _input_if_op(expanded, "Expand")
        source = _input_if_op(unsqueezed, "Unsqueeze") or _input_if_op(unsqueezed, "Reshape")
        if expanded is None or unsqueezed is None or source is None or self.shapes.rank(source) != 4:
            return None
        source_dims, unsqueezed_dims = self.shapes.dims(source), self.shapes.dims(unsqueezed)
        target, repeated_dims = self.shapes.int_values(_required_input(expanded.producer(), 1)), self.shapes.dims(repeated)
        if source_dims is None or unsqueezed_dims is None or target is None or len(target) != 5:
            return None
        batch, kv_heads, rows, width = source_dims
        repeats = target[2]
        if (
            not isinstance(kv_heads, int)
            or not isinstance(repeats, int)
            or unsqueezed_dims != (batch, kv_heads, 1, rows, width)
        ):
            return None
        unchanged = all(size in (1, -1, dim) for size, dim in zip(target, (batch, kv_heads, repeats, rows, width), strict=True))
        return source if unchanged and repeated_dims == (batch, kv_heads * repeats, rows, width) else None

    def _check_broadcast(self, match: AttentionMatch) -> None:
        """Raise PatternNotMatched if the MatMuls broadcast batch or heads, which Attention does not."""
        query, key, value = (self.shapes.dims(tensor) for tensor in (match.query, match.key, match.value))
        if query is None or key is None or value is None:
            raise PatternNotMatched("the shapes of query, key and value are unknown", match.output_node)
        if match.key_perm is not None:
            key = tuple(key[axis] for axis in match.key_perm)
        if len({tensor[0] == 1 for tensor in (query, key, value)}) > 1:
            raise PatternNotMatched("query, key and value differ in their batch size", match.output_node)
        describe = self.shapes.symbols.describe
        if match.rank == 4:
            heads, kv_heads = query[1], key[1]
            if value[1] != kv_heads:
                raise PatternNotMatched(
                    f"the keys have {describe(kv_heads)} heads, the values {describe(value[1])}", match.output_node
                )
            static = isinstance(heads, int) and isinstance(kv_heads, int)
            if heads != kv_heads and not (static and heads % kv_heads == 0):  # type: ignore[operator]
                raise PatternNotMatched(
                    f"{describe(heads)} query heads cannot share {describe(kv_heads)} key heads", match.output_node
                )
        for mask in match.masks:
            rank = self.shapes.rank(mask.value)
            if rank is None or rank > match.rank:
                raise PatternNotMatched(
                    "the rank of the mask is unknown"
                    if rank is None
                    else f"the mask has rank {rank}, the query rank {match.rank}",
                    mask.value,
                )
            dims = self.shapes.dims(mask.value)
            key_length = key[-2]
            if dims and dims[-1] == 1 and key_length != 1:
                raise PatternNotMatched("the mask has one value for all keys", mask.value)
            if dims and len(dims) == match.rank and query[0] == 1 and dims[0] != 1:
                raise PatternNotMatched("the query has batch size 1 and the mask has another batch size", mask.value)


class _ScoreTrace:
    """Traces the scores from a softmax back to the MatMul of query and key, and collects scales and masks on the path."""

    def __init__(self, shapes: ShapeInference) -> None:
        self.shapes = shapes
        self.scale = 1.0
        self.dynamic_scales: list[tuple[str, ir.Value]] = []
        self.masks: list[Mask] = []
        self.softmax_precision: ir.DataType | None = None
        self.softcap = 0.0

    def trace_to_matmul(self, value: ir.Value) -> ir.Node:
        """Return the MatMul of query and key that `value`, the input of a softmax, derives from. Raises PatternNotMatched."""
        while True:
            node = value.producer()
            if node is None:
                raise PatternNotMatched("the scores do not come from a MatMul", value)
            if node.op_type in ("MatMul", "FusedMatMul"):
                self._require_single_use(node.outputs[0])
                return node
            self._require_single_use(value)
            if node.op_type in ("Add", "Where"):
                value = self._record_mask(node)
            elif node.op_type in ("Mul", "Div"):
                value = self._record_scale(node)
            elif node.op_type in ("Cast", "Identity"):
                if node.op_type == "Cast" and not self.masks:
                    self.softmax_precision = node.outputs[0].dtype or ir.DataType(int_attribute(node, "to", 0))
                value = _required_input(node, 0)
            elif node.op_type == "Tanh":
                value = self._record_softcap(node)
            else:
                raise PatternNotMatched(f"there is a {node.op_type} between the MatMul and the softmax", node)

    def _require_single_use(self, value: ir.Value) -> None:
        if len(value.uses()) > 1 or value.is_graph_output():
            raise PatternNotMatched("the scores have other consumers", value)

    def _record_mask(self, node: ir.Node) -> ir.Value:
        """Record the mask of an Add or a Where; return the unmasked scores."""
        if self.softcap:
            raise PatternNotMatched("the scores are soft-capped after they are masked", node)
        if self.dynamic_scales or self.scale != 1.0:
            raise PatternNotMatched("the scores are scaled after they are masked", node)
        if node.op_type == "Where":
            condition, if_true, if_false = (_required_input(node, index) for index in range(3))
            fill, keep_if_true = (
                (constant_scalar(if_false), True)
                if constant_scalar(if_false) is not None
                else (constant_scalar(if_true), False)
            )
            if fill is None or fill > MASK_FILL_THRESHOLD:
                raise PatternNotMatched(
                    f"masked scores become {'a tensor' if fill is None else f'{fill:g}'}, which may have weight in the softmax",
                    node,
                )
            self.masks.append(Mask(condition, fill, keep_if_true))
            return if_true if keep_if_true else if_false
        left, right = _required_input(node, 0), _required_input(node, 1)
        left_is_scores, right_is_scores = self._leads_to_matmul(left), self._leads_to_matmul(right)
        if left_is_scores == right_is_scores:
            raise PatternNotMatched(
                "both sides of the Add may be the scores" if left_is_scores else "the scores do not come from a MatMul", node
            )
        scores, mask = (left, right) if left_is_scores else (right, left)
        self.masks.append(_boolean_mask_of(mask) or Mask(mask))
        return scores

    def _leads_to_matmul(self, value: ir.Value, max_nodes: int = _MAX_DISTANCE) -> bool:
        """Return whether `value` derives from a MatMul through ops that `trace_to_matmul` accepts, within `max_nodes` nodes."""
        node = value.producer()
        if node is None or not max_nodes:
            return False
        if node.op_type in ("MatMul", "FusedMatMul"):
            return constant_tensor(_required_input(node, 1)) is None
        if node.op_type == "Where":
            return self._leads_to_matmul(
                _required_input(node, 2 if constant_scalar(_required_input(node, 1)) is not None else 1), max_nodes - 1
            )
        if node.op_type not in ("Add", "Mul", "Div", "Cast", "Identity", "Tanh"):
            return False
        operands = [operand for operand in node.inputs if operand is not None and constant_tensor(operand) is None]
        return any(
            self._leads_to_matmul(operand, max_nodes - 1) for operand in (operands if node.op_type == "Add" else operands[:1])
        )

    def _record_softcap(self, node: ir.Node) -> ir.Value:
        """Record the factor of a Tanh of the scores as their soft cap; return the scores before the Tanh."""
        if self.dynamic_scales or self.softcap:
            raise PatternNotMatched("the scores are soft-capped by a tensor, or twice", node)
        self.softcap, self.scale = self.scale, 1.0
        return _required_input(node, 0)

    def _record_scale(self, node: ir.Node) -> ir.Value:
        """Record the factor of a Mul or Div of the scores; return the unscaled scores."""
        scores, factor = self._split_scale(node)
        if scores is None:
            raise PatternNotMatched(f"the scores are scaled by a tensor in a {node.op_type}", node)
        self._apply_scale(node.op_type, factor)
        return scores

    def strip_scale(self, value: ir.Value) -> ir.Value:
        """Record the scalars that `value`, a query or a key, is multiplied by; return it unscaled."""
        while True:
            node = value.producer()
            if node is None or node.op_type not in ("Mul", "Div") or node.domain != "":
                return value
            unscaled, factor = self._split_scale(node)
            if unscaled is None:
                return value
            self._apply_scale(node.op_type, factor)
            value = unscaled

    def _split_scale(self, node: ir.Node) -> tuple[ir.Value | None, ir.Value]:
        left, right = _required_input(node, 0), _required_input(node, 1)
        if self._is_scalar(right):
            return left, right
        return (right, left) if node.op_type == "Mul" and self._is_scalar(left) else (None, right)

    def _is_scalar(self, value: ir.Value) -> bool:
        if constant_scalar(value) is not None:
            return True
        dims = self.shapes.dims(value)
        return dims is not None and len(dims) <= 1 and all(size == 1 for size in dims)

    def _apply_scale(self, op: str, factor: ir.Value) -> None:
        number = constant_scalar(factor)
        if number is None or number <= 0:
            self.dynamic_scales.append((op, factor))
        else:
            self.scale *= number if op == "Mul" else 1 / number


def _boolean_mask_of(mask: ir.Value) -> Mask | None:
    """Return the condition of a mask Where(condition, 0, -inf) or Where(condition, -inf, 0); None for another mask."""
    node = mask.producer()
    if node is None or node.op_type != "Where":
        return None
    branches = [constant_scalar(_required_input(node, index)) for index in (1, 2)]
    if sorted(map(str, branches)) != ["-inf", "0.0"]:
        return None
    return Mask(_required_input(node, 0), float("-inf"), keep_if_true=branches[0] == 0)


def _required_input(node: ir.Node | None, index: int) -> ir.Value:
    value = node.inputs[index] if node is not None and index < len(node.inputs) else None
    if value is None:
        raise PatternNotMatched("an input is missing", node)
    return value


def _input_if_op(value: ir.Value | None, op: str) -> ir.Value | None:
    """Return the first input of the producer of `value` if that is an `op`, else None."""
    node = value.producer() if value is not None else None
    return node.inputs[0] if node is not None and node.op_type == op and node.domain == "" else None


def _nan_guard_output(value: ir.Value, uses: list[ir.Node]) -> ir.Value | None:
    """Return the output of Where(IsNaN(value), 0, value) if `value` has no other consumer, else None."""
    wheres = [node for node in uses if node.op_type == "Where" and node.inputs[2] is value]
    tests = [node for node in uses if node.op_type == "IsNaN"]
    if len(wheres) != 1 or len(tests) != 1 or len(uses) != 2 or wheres[0].inputs[0] is not tests[0].outputs[0]:
        return None
    zero = wheres[0].inputs[1]
    return (
        wheres[0].outputs[0]
        if zero is not None and constant_scalar(zero) == 0 and len(tests[0].outputs[0].uses()) == 1
        else None
    )
