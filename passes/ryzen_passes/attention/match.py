"""Finding attention that was written out: softmax(scale * Q K^T + mask) V, in the spellings that exporters use."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from ryzen_compile.ir.analysis.sizes import ShapeInference, Size, constant_tensor, int_attribute
from ryzen_passes.attention.masks import Mask

MASK_FILL_THRESHOLD = -1e4
"""A score that is replaced by this or less has no weight in a softmax over scores of ordinary size."""

_MAX_DISTANCE = 12
"""How many nodes may stand between a softmax and the product that it is of."""
_LAST_TWO_SWAPPED = (0, 1, 3, 2)
_LAST_TO_SECOND = (0, 2, 3, 1)


class MatchFailure(Exception):
    """Why a place that looks like attention was left alone."""

    def __init__(self, reason: str, location: ir.Value | ir.Node | None = None) -> None:
        super().__init__(reason if location is None else f"{reason} (`{location.name}`)")


@dataclass
class AttentionMatch:
    """One attention: what goes in, what comes out, and how it is scaled and masked."""

    output_node: ir.Node
    """The last node, which gives (B, H, S, D), or (B, S, D) where there is no axis of heads."""
    query: ir.Value
    key: ir.Value
    key_perm: tuple[int, ...] | None
    """How to transpose `key` before it is (B, heads, T, D); None: it is."""
    value: ir.Value
    scale: float
    rank: int
    dynamic_scales: list[tuple[str, ir.Value]] = field(default_factory=list)
    """Scalars that are only known at run time, as (Mul or Div, value): the query is scaled by them."""
    masks: list[Mask] = field(default_factory=list)
    is_grouped_query: bool = False
    """Whether several heads of the query read one head of the keys."""
    softmax_precision: ir.DataType | None = None
    """The type that the softmax computes in, where it is another than that of its neighbours."""


class AttentionMatcher:
    """Reads attention off a model."""

    def __init__(self, shapes: ShapeInference) -> None:
        self.shapes = shapes

    def match(self, softmax: ir.Node) -> AttentionMatch | None:
        """Return the attention whose weights `softmax` computes; None where it has nothing of one. Raises Miss."""
        weighted, stray = self._find_value_matmul(softmax)
        scores = _required_input(softmax, 0)
        if weighted is None or not self.comes_from_matmul(scores):
            return None
        if stray is not None:
            raise MatchFailure("the attention weights are read elsewhere too", stray)
        above = _ScoreTrace(self.shapes)
        product = above.trace_to_matmul(scores)
        rank = self.shapes.rank(_required_input(product, 0))
        if rank not in (3, 4):
            raise MatchFailure(
                "the query has an unknown number of axes" if rank is None else f"the query has {rank} axes", product
            )
        if int_attribute(softmax, "axis", -1) not in (-1, rank - 1):
            raise MatchFailure("the softmax does not run over the keys", softmax)
        query, key, key_perm = self._query_and_key(product, above, rank)
        value = _required_input(weighted, 1)
        if self.shapes.rank(value) != rank:
            raise MatchFailure("the values have another number of axes than the query", value)
        site = AttentionMatch(
            output_node=weighted,
            query=query,
            key=key,
            key_perm=key_perm,
            value=value,
            scale=above.scale,
            rank=rank,
            dynamic_scales=above.dynamic_scales,
            masks=above.masks[::-1],
            softmax_precision=above.softmax_precision,
        )
        if rank == 4:
            self._strip_repeat_kv(site)
        self._check_broadcast(site)
        return site

    def comes_from_matmul(self, value: ir.Value, max_nodes: int = _MAX_DISTANCE) -> bool:
        """Whether `value` is a product of two computed matrices, through at most `left` nodes of any kind."""
        node = value.producer()
        if node is None or not max_nodes:
            return False
        if node.op_type in ("MatMul", "FusedMatMul"):
            return constant_tensor(_required_input(node, 1)) is None
        sides = [one for one in node.inputs[:3] if one is not None and constant_tensor(one) is None]
        if node.op_type not in ("Add", "Where", "Max", "Sub"):
            sides = sides[:1]
        return any(self.comes_from_matmul(one, max_nodes - 1) for one in sides)

    def _find_value_matmul(self, softmax: ir.Node) -> tuple[ir.Node | None, ir.Value | None]:
        """Return the product of the weights with the values, and the weights where something else reads them too."""
        stray, value = None, softmax.outputs[0]
        while True:
            uses = [use.node for use in value.uses()]
            if value.is_graph_output():
                stray = value
            guarded = _nan_guard_output(value, uses)
            if guarded is not None:
                value = guarded
                continue
            if len(uses) > 1:
                stray = value
            product = next((node for node in uses if node.op_type == "MatMul" and node.inputs[0] is value), None)
            if product is not None:
                return product, stray
            # A Dropout with a third input may be one that trains.
            carriers = [node for node in uses if node.op_type in ("Cast", "Identity", "Dropout") and len(node.inputs) < 3]
            carrier = next(iter(carriers), None)
            if carrier is None:
                return None, stray
            value = carrier.outputs[0]

    def _query_and_key(
        self, matmul: ir.Node, trace: _ScoreTrace, rank: int
    ) -> tuple[ir.Value, ir.Value, tuple[int, ...] | None]:
        """Return the query, the key, and how the key must be transposed to be (B, heads, T, D)."""
        query, key = trace.strip_scale(_required_input(matmul, 0)), trace.strip_scale(_required_input(matmul, 1))
        if self.shapes.rank(key) != rank:
            raise MatchFailure("query and key differ in their number of axes", matmul)
        if matmul.op_type == "FusedMatMul":
            if (
                int_attribute(matmul, "transA", 0)
                or int_attribute(matmul, "transBatchA", 0)
                or int_attribute(matmul, "transBatchB", 0)
            ):
                raise MatchFailure("the query is transposed", matmul)
            trace.scale *= matmul.attributes["alpha"].as_float() if "alpha" in matmul.attributes else 1.0
            if int_attribute(matmul, "transB", 0):
                return query, trace.strip_scale(key), None
        elif matmul.domain != "":
            raise MatchFailure(f"the product is of the unknown domain `{matmul.domain}`", matmul)
        swapped = (0, 2, 1) if rank == 3 else _LAST_TWO_SWAPPED
        node = key.producer()
        if node is not None and node.op_type == "Transpose":
            perm = tuple(node.attributes["perm"].as_ints()) if "perm" in node.attributes else ()
            if perm == swapped:
                return query, trace.strip_scale(_required_input(node, 0)), None
            if perm == _LAST_TO_SECOND:
                return query, trace.strip_scale(_required_input(node, 0)), (0, 2, 1, 3)
        flat = self._key_before_flat_transpose(key)
        if flat is not None:
            return query, trace.strip_scale(flat), None
        return query, key, swapped

    def _key_before_flat_transpose(self, key: ir.Value) -> ir.Value | None:
        """Return K of Reshape(Transpose(Reshape(K, (B*H, T, D))), (B, H, D, T)), or None."""
        inner = _input_if_op(key, "Reshape")
        turned = _input_if_op(inner, "Transpose")
        source = _input_if_op(turned, "Reshape")
        if inner is None or turned is None or source is None or self.shapes.rank(source) != 4:
            return None
        perm = inner.producer().attributes.get("perm")  # type: ignore[union-attr]
        before, flat, after = self.shapes.dims(source), self.shapes.dims(turned), self.shapes.dims(key)
        if before is None or flat is None or after is None or perm is None or tuple(perm.as_ints()) != (0, 2, 1):
            return None
        batch, heads, rows, width = before
        return source if flat[1:] == (rows, width) and after == (batch, heads, width, rows) else None

    def _strip_repeat_kv(self, match: AttentionMatch) -> None:
        """Take keys and values from before they were repeated for the heads that share them."""
        if match.key_perm is not None:
            return
        key, value = self.before_repeat_kv(match.key), self.before_repeat_kv(match.value)
        if key is not None and value is not None:
            match.key, match.value, match.is_grouped_query = key, value, True

    def before_repeat_kv(self, repeated: ir.Value) -> ir.Value | None:
        """Return x (B, G, T, D) of Reshape(Expand(Unsqueeze(x, 2), (B, G, n, T, D)), (B, G*n, T, D)), or None."""
        wide = _input_if_op(repeated, "Reshape")
        one = _input_if_op(wide, "Expand")
        source = _input_if_op(one, "Unsqueeze") or _input_if_op(one, "Reshape")
        if wide is None or one is None or source is None or self.shapes.rank(source) != 4:
            return None
        before, single = self.shapes.dims(source), self.shapes.dims(one)
        expanded, after = self.shapes.int_values(_required_input(wide.producer(), 1)), self.shapes.dims(repeated)
        if before is None or single is None or expanded is None or len(expanded) != 5:
            return None
        batch, groups, rows, width = before
        times = expanded[2]
        if not isinstance(groups, int) or not isinstance(times, int) or single != (batch, groups, 1, rows, width):
            return None
        kept = all(size in (1, -1, known) for size, known in zip(expanded, (batch, groups, times, rows, width), strict=True))
        return source if kept and after == (batch, groups * times, rows, width) else None

    def _check_broadcast(self, match: AttentionMatch) -> None:
        """Attention takes batches and heads as they are; a MatMul would also repeat them."""
        query, key, value = (self.shapes.dims(one) for one in (match.query, match.key, match.value))
        if query is None or key is None or value is None:
            raise MatchFailure("the shapes of query, key and value are not known", match.output_node)
        if match.key_perm is not None:
            key = tuple(key[axis] for axis in match.key_perm)
        if len({one[0] == 1 for one in (query, key, value)}) > 1:
            raise MatchFailure("query, key and value differ in their batch", match.output_node)
        if match.rank == 4:
            heads, groups = query[1], key[1]
            if value[1] != groups:
                raise MatchFailure(
                    f"the keys have {_format_size(groups)} heads and the values {_format_size(value[1])}", match.output_node
                )
            known = isinstance(heads, int) and isinstance(groups, int)
            if heads != groups and not (known and heads % groups == 0):  # type: ignore[operator]
                raise MatchFailure(f"{_format_size(heads)} heads cannot share {_format_size(groups)}", match.output_node)
        for mask in match.masks:
            rank = self.shapes.rank(mask.value)
            if rank is None or rank > match.rank:
                raise MatchFailure(
                    "the mask has an unknown number of axes" if rank is None else f"the mask has {rank} axes", mask.value
                )
            dims = self.shapes.dims(mask.value)
            rows = key[-2]
            if dims and dims[-1] == 1 and rows != 1:
                raise MatchFailure("the mask is one number for all keys", mask.value)
            if dims and len(dims) == match.rank and query[0] == 1 and dims[0] != 1:
                raise MatchFailure("the mask has more batches than the query", mask.value)


class _ScoreTrace:
    """Climbs from a softmax to the product of query and key, and collects what is done to the scores on the way."""

    def __init__(self, shapes: ShapeInference) -> None:
        self.shapes = shapes
        self.scale = 1.0
        self.dynamic_scales: list[tuple[str, ir.Value]] = []
        self.masks: list[Mask] = []
        self.softmax_precision: ir.DataType | None = None

    def trace_to_matmul(self, value: ir.Value) -> ir.Node:
        """Return the product that `value`, the input of a softmax, goes back to. Raises Miss."""
        while True:
            node = value.producer()
            if node is None:
                raise MatchFailure("the scores are no product", value)
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
                raise MatchFailure("the scores are soft-capped", node)
            else:
                raise MatchFailure(f"a {node.op_type} stands between the product and the softmax", node)

    def _require_single_use(self, value: ir.Value) -> None:
        if len(value.uses()) > 1 or value.is_graph_output():
            raise MatchFailure("the scores are read elsewhere too", value)

    def _record_mask(self, node: ir.Node) -> ir.Value:
        """Note the mask of an Add or a Where, and return the scores below it."""
        if self.dynamic_scales or self.scale != 1.0:
            raise MatchFailure("the scores are scaled after they are masked", node)
        if node.op_type == "Where":
            condition, yes, no = (_required_input(node, at) for at in range(3))
            fill, keeps = (_scalar(no), True) if _scalar(no) is not None else (_scalar(yes), False)
            if fill is None or fill > MASK_FILL_THRESHOLD:
                raise MatchFailure(
                    f"masked scores become {'a tensor' if fill is None else f'{fill:g}'}, which may still count", node
                )
            self.masks.append(Mask(condition, fill, keeps))
            return yes if keeps else no
        one, two = _required_input(node, 0), _required_input(node, 1)
        first, second = self._leads_to_matmul(one), self._leads_to_matmul(two)
        if first == second:
            raise MatchFailure("which side of the Add is the mask is not clear" if first else "the scores are no product", node)
        scores, mask = (one, two) if first else (two, one)
        self.masks.append(_boolean_mask_of(mask) or Mask(mask))
        return scores

    def _leads_to_matmul(self, value: ir.Value, max_nodes: int = _MAX_DISTANCE) -> bool:
        """Whether `value` goes back to a product through what `climb` climbs."""
        node = value.producer()
        if node is None or not max_nodes:
            return False
        if node.op_type in ("MatMul", "FusedMatMul"):
            return constant_tensor(_required_input(node, 1)) is None
        if node.op_type == "Where":
            return self._leads_to_matmul(
                _required_input(node, 2 if _scalar(_required_input(node, 1)) is not None else 1), max_nodes - 1
            )
        if node.op_type not in ("Add", "Mul", "Div", "Cast", "Identity", "Tanh"):
            return False
        sides = [one for one in node.inputs if one is not None and constant_tensor(one) is None]
        return any(self._leads_to_matmul(one, max_nodes - 1) for one in (sides if node.op_type == "Add" else sides[:1]))

    def _record_scale(self, node: ir.Node) -> ir.Value:
        """Note the factor of a Mul or a Div of the scores, and return the scores below it."""
        scores, factor = self._split_scale(node)
        if scores is None:
            raise MatchFailure(f"the scores are scaled by a tensor in a {node.op_type}", node)
        self._apply_scale(node.op_type, factor)
        return scores

    def strip_scale(self, value: ir.Value) -> ir.Value:
        """Note the scalars that `value`, a query or a key, is multiplied by, and return what it was before."""
        while True:
            node = value.producer()
            if node is None or node.op_type not in ("Mul", "Div") or node.domain != "":
                return value
            rest, factor = self._split_scale(node)
            if rest is None:
                return value
            self._apply_scale(node.op_type, factor)
            value = rest

    def _split_scale(self, node: ir.Node) -> tuple[ir.Value | None, ir.Value]:
        one, two = _required_input(node, 0), _required_input(node, 1)
        if self._is_scalar(two):
            return one, two
        return (two, one) if node.op_type == "Mul" and self._is_scalar(one) else (None, two)

    def _is_scalar(self, value: ir.Value) -> bool:
        if _scalar(value) is not None:
            return True
        dims = self.shapes.dims(value)
        return dims is not None and len(dims) <= 1 and all(size == 1 for size in dims)

    def _apply_scale(self, op: str, factor: ir.Value) -> None:
        number = _scalar(factor)
        if number is None or number <= 0:
            self.dynamic_scales.append((op, factor))
        else:
            self.scale *= number if op == "Mul" else 1 / number


def _boolean_mask_of(mask: ir.Value) -> Mask | None:
    """Return the condition of a mask Where(condition, 0, -inf), or its inverse; None for another mask."""
    node = mask.producer()
    if node is None or node.op_type != "Where":
        return None
    branches = [_scalar(_required_input(node, at)) for at in (1, 2)]
    if sorted(map(str, branches)) != ["-inf", "0.0"]:
        return None
    return Mask(_required_input(node, 0), float("-inf"), keep_if_true=branches[0] == 0)


def _required_input(node: ir.Node | None, index: int) -> ir.Value:
    value = node.inputs[index] if node is not None and index < len(node.inputs) else None
    if value is None:
        raise MatchFailure("an input is missing", node)
    return value


def _input_if_op(value: ir.Value | None, op: str) -> ir.Value | None:
    """Return the first input of the node that makes `value` where that is an `op`, else None."""
    node = value.producer() if value is not None else None
    return node.inputs[0] if node is not None and node.op_type == op and node.domain == "" else None


def _scalar(value: ir.Value) -> float | None:
    """Return the number that `value` always is, or None."""
    tensor = constant_tensor(value)
    if tensor is None or tensor.size != 1 or not tensor.dtype.is_floating_point():
        return None
    return float(tensor.numpy().reshape(-1)[0])


def _nan_guard_output(value: ir.Value, uses: list[ir.Node]) -> ir.Value | None:
    """Return the output of Where(IsNaN(value), 0, value) where that alone reads `value`, else None."""
    wheres = [node for node in uses if node.op_type == "Where" and node.inputs[2] is value]
    tests = [node for node in uses if node.op_type == "IsNaN"]
    if len(wheres) != 1 or len(tests) != 1 or len(uses) != 2 or wheres[0].inputs[0] is not tests[0].outputs[0]:
        return None
    zero = wheres[0].inputs[1]
    return wheres[0].outputs[0] if zero is not None and _scalar(zero) == 0 and len(tests[0].outputs[0].uses()) == 1 else None


def _format_size(size: Size) -> str:
    return str(size) if isinstance(size, (int, str)) else "unknown"
