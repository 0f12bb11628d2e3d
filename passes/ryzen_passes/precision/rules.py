"""Which nodes must not go to half precision: the table of rules, and the evidence that they read."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import onnx_ir as ir

from ryzen_compile.ir.analysis.element_types import ElementTypes, is_standard_op
from ryzen_compile.ir.lazy_cast import max_magnitude
from ryzen_compile.spec.passes import ValueRange


@dataclass(frozen=True)
class HalfType:
    """A half-precision type."""

    name: str
    dtype: ir.DataType

    @property
    def max(self) -> float:
        """The largest finite value."""
        return float(self._finfo.max)

    @property
    def smallest_normal(self) -> float:
        """The smallest value that still has all digits."""
        return float(self._finfo.smallest_normal)

    @property
    def _finfo(self) -> Any:
        return ml_dtypes.finfo(self.dtype.numpy())  # type: ignore[no-untyped-call]


HALF_TYPES_BY_NAME = {"fp16": HalfType("fp16", ir.DataType.FLOAT16), "bf16": HalfType("bf16", ir.DataType.BFLOAT16)}


@dataclass(frozen=True)
class CastPlan:
    """The inputs and outputs of a node, by their places, that change type when the node goes to half precision."""

    inputs: frozenset[int] = frozenset()
    outputs: frozenset[int] = frozenset()


@dataclass(frozen=True)
class PrecisionAnalysis:
    """What the rules read."""

    half: HalfType
    types: ElementTypes
    cast_plans: Mapping[ir.Node, CastPlan]
    range_margin: float
    ranges: Mapping[str, ValueRange] | None
    """The measured ranges, None where nothing was measured."""
    constant_magnitudes: Mapping[ir.Value, float]
    """The largest finite absolute value in each fp32 constant."""
    mask_fills: frozenset[ir.Value]
    """Tensors that hold fill values: what is far below zero in them stands for minus infinity."""
    positional_nodes: frozenset[ir.Node]
    """Nodes that compute with nothing but whole numbers and constants."""
    statistics_nodes: frozenset[ir.Node]
    """Nodes that compute with nothing but sums and constants."""

    def tensors(self, node: ir.Node) -> Iterable[ir.Value]:
        """Return the tensors of `node` that would change type."""
        moves = self.cast_plans[node]
        for index in sorted(moves.inputs):
            if (value := node.inputs[index]) is not None:
                yield value
        for index in sorted(moves.outputs):
            yield node.outputs[index]

    def magnitude(self, value: ir.Value) -> float | None:
        """Return the largest absolute value that `value` holds or was seen to hold, fill values aside, or None."""
        if value in self.constant_magnitudes:
            return self.constant_magnitudes[value]
        seen = (self.ranges or {}).get(value.name or "")
        if seen is None:
            return None
        return max(seen.high, 0.0) if value in self.mask_fills else seen.magnitude


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the tensor that `value` always holds, or None."""
    if value is None or value.is_graph_input():
        return None
    if value.is_initializer():
        return value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant" or not is_standard_op(node):
        return None
    return ir.convenience.get_const_tensor(value)


def measure_constant_magnitudes(graph: ir.Graph, types: ElementTypes) -> dict[ir.Value, float]:
    """Return the largest finite absolute value of each fp32 constant of `graph`; reads every weight once."""
    made = (value for node in graph if node.op_type == "Constant" for value in node.outputs)
    return {
        value: max_magnitude(tensor)
        for value in (*graph.initializers.values(), *made)
        if types.get(value) == ir.DataType.FLOAT and (tensor := constant_tensor(value)) is not None
    }


RulePredicate = Callable[[ir.Node, PrecisionAnalysis], str | None]


@dataclass(frozen=True)
class PrecisionRule:
    """A reason for which a node stays fp32: its op is one of `ops` (any, where there is none) and `holds` says why."""

    name: str
    description: str
    ops: frozenset[str] = frozenset()
    predicate: RulePredicate = lambda node, evidence: ""

    def reason(self, node: ir.Node, analysis: PrecisionAnalysis) -> str | None:
        """Return why `node` stays fp32 by this rule, or None."""
        if self.ops and not (is_standard_op(node) and node.op_type in self.ops):
            return None
        found = self.predicate(node, analysis)
        return None if found is None else f"{self.name}: {found or self.description}"


def _is_statistic(node: ir.Node, analysis: PrecisionAnalysis) -> str | None:
    if node in analysis.statistics_nodes:
        return ""
    squares = node.op_type == "Mul" and node.inputs[0] is node.inputs[1]
    summed = squares and any(reader.op_type in SUM_OPS for reader in node.outputs[0].consumers())
    return "a square overflows from 256 on, and its sum sooner" if summed else None


def _is_power(node: ir.Node, analysis: PrecisionAnalysis) -> str | None:
    exponent = constant_tensor(node.inputs[1]) if len(node.inputs) > 1 else None
    small = exponent is not None and exponent.size == 1 and 0 < float(exponent.numpy().reshape(-1)[0]) <= 3
    measured = all(analysis.magnitude(value) is not None for value in analysis.tensors(node))
    return None if small and measured else ""


def _is_positional(node: ir.Node, analysis: PrecisionAnalysis) -> str | None:
    return "" if node in analysis.positional_nodes else None


def _is_dequantized(node: ir.Node, analysis: PrecisionAnalysis) -> str | None:
    for value in node.inputs:
        if value is not None and (maker := value.producer()) is not None and maker.op_type == "DequantizeLinear":
            return ""
    return None


def _is_non_attention_softmax(node: ir.Node, analysis: PrecisionAnalysis) -> str | None:
    """Hold unless the input is made of a product of two activations, as attention scores are."""
    waiting = deque([node.inputs[0]])
    for _ in range(_MAX_VISITED_TENSORS):
        value = waiting.popleft() if waiting else None
        maker = value.producer() if value is not None else None
        if maker is None:
            continue
        if maker.op_type in ("MatMul", "Einsum") and all(constant_tensor(source) is None for source in maker.inputs):
            return None
        if maker.op_type in _PASS_THROUGH_OPS:
            waiting.extend(maker.inputs)
    return ""


def _is_out_of_range(node: ir.Node, analysis: PrecisionAnalysis) -> str | None:
    for value in analysis.tensors(node):
        found = analysis.constant_magnitudes.get(value, 0.0)
        if found > analysis.half.max:
            return f"`{value.name}` holds {found:.4g}, {analysis.half.name} ends at {analysis.half.max:.4g}"
    fill = node.attributes.get("value") if node.op_type == "ConstantOfShape" else None
    if fill is not None and max_magnitude(fill.value) > analysis.half.max:
        return f"it fills with more than {analysis.half.max:.4g}"
    return None


def _underflows(node: ir.Node, analysis: PrecisionAnalysis) -> str | None:
    for value in analysis.tensors(node):
        found = analysis.magnitude(value)
        if found is not None and 0 < found < analysis.half.smallest_normal:
            return f"`{value.name}` holds {found:.4g} at most, digits are lost below {analysis.half.smallest_normal:.4g}"
    return None


def _overflows(node: ir.Node, analysis: PrecisionAnalysis) -> str | None:
    most = analysis.half.max / analysis.range_margin
    for value in analysis.tensors(node):
        found = analysis.magnitude(value) or 0.0
        if value in analysis.constant_magnitudes:
            continue
        if found > most:
            return f"`{value.name}` reached {found:.4g}, the limit is {most:.4g}"
        cubes = node.op_type == "Gelu" and value is node.inputs[0]
        if cubes and node.attributes.get_string("approximate") == "tanh" and found**3 > most:
            return f"the cube of `{value.name}` reached {found**3:.4g}, the limit is {most:.4g}"
    return None


SUM_OPS = frozenset(
    """ReduceSum ReduceMean ReduceL1 ReduceL2 ReduceSumSquare ReduceProd ReduceLogSum ReduceLogSumExp CumSum CumProd
    MeanVarianceNormalization LpNormalization LpPool GlobalLpPool LRN DFT STFT""".split()
)
_MAX_VISITED_TENSORS = 64
"""How many tensors before a softmax are looked at for the product that makes the scores."""
_PASS_THROUGH_OPS = frozenset(
    """Add Sub Mul Div Where Max Min Clip Cast Reshape Transpose Squeeze Unsqueeze Slice Concat Expand Tanh""".split()
)

PRECISION_RULES: tuple[PrecisionRule, ...] = (
    PrecisionRule("sum", "a sum needs more digits than its terms, and overflows before its mean does", SUM_OPS),
    PrecisionRule("statistic", "means and variances of small tensors vanish", predicate=_is_statistic),
    PrecisionRule("power", "a power overflows unless its range was measured", frozenset({"Pow"}), _is_power),
    PrecisionRule(
        "exponential", "e^x overflows from 11 on, and rounding x shifts it", frozenset(["Exp", "Softplus", "Sinh", "Cosh"])
    ),
    PrecisionRule("angle", "an angle of many turns loses its place in a turn", frozenset(["Sin", "Cos", "Tan"])),
    PrecisionRule(
        "position",
        "it counts, and whole numbers are no longer exact from 2048 (fp16) or 256 (bf16) on",
        predicate=_is_positional,
    ),
    PrecisionRule(
        "softmax",
        "its input is not attention scores, and its sums need the digits",
        frozenset(["Softmax", "LogSoftmax"]),
        _is_non_attention_softmax,
    ),
    PrecisionRule(
        "order", "rounding makes ties, and ties change the order", frozenset(["TopK", "NonMaxSuppression", "Unique"])
    ),
    PrecisionRule(
        "coordinate", "coordinates need more digits", frozenset(["GridSample", "RoiAlign", "MaxRoiPool", "AffineGrid"])
    ),
    PrecisionRule(
        "random",
        "the draws would be others",
        frozenset(["RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"]),
    ),
    PrecisionRule("quantised", "scales stay fp32", frozenset(["QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"])),
    PrecisionRule("dequantised", "its input comes from integers, with an fp32 scale", predicate=_is_dequantized),
    PrecisionRule("weight", "a constant is out of range", predicate=_is_out_of_range),
    PrecisionRule("underflow", "it is too small", predicate=_underflows),
    PrecisionRule("overflow", "it was measured to be too large", predicate=_overflows),
)
"""Read in this order, for nodes whose op has a half-precision type in the opset of the model; the first that holds is named.

`headroom` times what was measured must stay below the largest value of the type. What TensorRT computes in fp32 whatever the
type of its tensors - the statistics of LayerNormalization, RMSNormalization, InstanceNormalization, GroupNormalization, the
softmax inside of an attention - is in no rule but the measured ones.
"""
