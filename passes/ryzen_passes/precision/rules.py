"""The precision rules, which decide the nodes that must stay fp32, and the analysis that they read."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import onnx_ir as ir

from ryzen_compile.ir.analysis.constants import constant_scalar, constant_tensor
from ryzen_compile.ir.analysis.element_types import ElementTypes, is_standard_op
from ryzen_compile.ir.analysis.op_traits import ACCUMULATING_REDUCE_OPS, LAYOUT_OPS, RANDOM_OPS
from ryzen_compile.ir.lazy_cast import max_magnitude
from ryzen_compile.spec.passes import ValueRange


@dataclass(frozen=True)
class HalfType:
    """A half-precision element type."""

    name: str
    dtype: ir.DataType

    @property
    def max(self) -> float:
        """The largest finite value."""
        return float(self._finfo.max)

    @property
    def smallest_normal(self) -> float:
        """The smallest positive normal value; smaller values lose significant digits."""
        return float(self._finfo.smallest_normal)

    @property
    def _finfo(self) -> Any:
        return ml_dtypes.finfo(self.dtype.numpy())  # type: ignore[no-untyped-call]


HALF_TYPES_BY_NAME = {"fp16": HalfType("fp16", ir.DataType.FLOAT16), "bf16": HalfType("bf16", ir.DataType.BFLOAT16)}
MIN_BF16_OPSET = 13
"""The first opset with ops that support bf16."""


@dataclass(frozen=True)
class CastPlan:
    """The indices of the inputs and outputs that change type when a node is converted to half precision."""

    inputs: frozenset[int] = frozenset()
    outputs: frozenset[int] = frozenset()


@dataclass(frozen=True)
class PrecisionAnalysis:
    """The analysis results that the rules read."""

    half: HalfType
    types: ElementTypes
    cast_plans: Mapping[ir.Node, CastPlan]
    range_margin: float
    ranges: Mapping[str, ValueRange] | None
    """The measured range of each tensor by name; None if nothing was measured."""
    constant_magnitudes: Mapping[ir.Value, float]
    """The largest finite absolute value in each fp32 constant."""
    mask_fills: frozenset[ir.Value]
    """Tensors that hold mask fill values: their very negative elements represent minus infinity."""
    positional_nodes: frozenset[ir.Node]
    """Nodes that compute only with integers and constants."""
    statistics_nodes: frozenset[ir.Node]
    """Nodes that compute only with sums and constants."""

    def tensors(self, node: ir.Node) -> Iterable[ir.Value]:
        """Yield the tensors of `node` that change type if it is converted."""
        cast_plan = self.cast_plans[node]
        for index in sorted(cast_plan.inputs):
            if (value := node.inputs[index]) is not None:
                yield value
        for index in sorted(cast_plan.outputs):
            yield node.outputs[index]

    def magnitude(self, value: ir.Value) -> float | None:
        """Return the largest absolute value of a constant, or the measured one without mask fill values; None if unknown."""
        if value in self.constant_magnitudes:
            return self.constant_magnitudes[value]
        measured = (self.ranges or {}).get(value.name or "")
        if measured is None:
            return None
        return max(measured.high, 0.0) if value in self.mask_fills else measured.magnitude


def measure_constant_magnitudes(graph: ir.Graph, types: ElementTypes) -> dict[ir.Value, float]:
    """Return the largest finite absolute value of each fp32 constant of `graph`; this reads every weight once."""
    constants = (value for node in graph if node.op_type == "Constant" for value in node.outputs)
    return {
        value: max_magnitude(tensor)
        for value in (*graph.initializers.values(), *constants)
        if types.get(value) == ir.DataType.FLOAT and (tensor := constant_tensor(value)) is not None
    }


RulePredicate = Callable[[ir.Node, PrecisionAnalysis], str | None]
"""Return a reason, "" for the description of the rule as the reason, or None if the rule does not apply."""


@dataclass(frozen=True)
class PrecisionRule:
    """A rule for nodes that stay fp32: it applies if the op is in `ops` (any op if empty) and `predicate` returns a reason."""

    name: str
    description: str
    ops: frozenset[str] = frozenset()
    predicate: RulePredicate = lambda node, analysis: ""

    def reason(self, node: ir.Node, analysis: PrecisionAnalysis) -> str | None:
        """Return the reason why this rule keeps `node` in fp32, or None if the rule does not apply."""
        if self.ops and not (is_standard_op(node) and node.op_type in self.ops):
            return None
        reason = self.predicate(node, analysis)
        return None if reason is None else f"{self.name}: {reason or self.description}"


def _is_statistic(node: ir.Node, analysis: PrecisionAnalysis) -> str | None:
    if node in analysis.statistics_nodes:
        return ""
    is_square = node.op_type == "Mul" and node.inputs[0] is node.inputs[1]
    is_summed = is_square and any(consumer.op_type in SUM_OPS for consumer in node.outputs[0].consumers())
    return "a square overflows fp16 from 256 on, its sum earlier" if is_summed else None


def _is_power(node: ir.Node, analysis: PrecisionAnalysis) -> str | None:
    exponent = constant_scalar(node.inputs[1]) if len(node.inputs) > 1 else None
    is_small = exponent is not None and 0 < exponent <= 3
    is_measured = all(analysis.magnitude(value) is not None for value in analysis.tensors(node))
    return None if is_small and is_measured else ""


def _is_positional(node: ir.Node, analysis: PrecisionAnalysis) -> str | None:
    return "" if node in analysis.positional_nodes else None


def _has_sequence_lengths(node: ir.Node, analysis: PrecisionAnalysis) -> str | None:
    return "" if len(node.inputs) > _SEQUENCE_LENS_INPUT and node.inputs[_SEQUENCE_LENS_INPUT] is not None else None


def _is_dequantized(node: ir.Node, analysis: PrecisionAnalysis) -> str | None:
    for value in node.inputs:
        if value is not None and (producer := value.producer()) is not None and producer.op_type == "DequantizeLinear":
            return ""
    return None


def _is_non_attention_softmax(node: ir.Node, analysis: PrecisionAnalysis) -> str | None:
    """Apply unless the input derives from a MatMul of two activations, as attention scores do."""
    worklist = deque([node.inputs[0]])
    for _ in range(_MAX_VISITED_TENSORS):
        value = worklist.popleft() if worklist else None
        producer = value.producer() if value is not None else None
        if producer is None:
            continue
        if producer.op_type in ("MatMul", "Einsum") and all(constant_tensor(operand) is None for operand in producer.inputs):
            return None
        if producer.op_type in _PASS_THROUGH_OPS:
            worklist.extend(producer.inputs)
    return ""


def _is_out_of_range(node: ir.Node, analysis: PrecisionAnalysis) -> str | None:
    for value in analysis.tensors(node):
        magnitude = analysis.constant_magnitudes.get(value, 0.0)
        if magnitude > analysis.half.max:
            return f"`{value.name}` contains {magnitude:.4g}, the largest {analysis.half.name} value is {analysis.half.max:.4g}"
    fill = node.attributes.get("value") if node.op_type == "ConstantOfShape" else None
    if fill is not None and max_magnitude(fill.value) > analysis.half.max:
        return f"its fill value is larger than {analysis.half.max:.4g}, the largest {analysis.half.name} value"
    return None


def _underflows(node: ir.Node, analysis: PrecisionAnalysis) -> str | None:
    limit = analysis.half.smallest_normal
    for value in analysis.tensors(node):
        magnitude = analysis.magnitude(value)
        if magnitude is not None and 0 < magnitude < limit:
            return f"`{value.name}` contains at most {magnitude:.4g}, below {limit:.4g} digits are lost"
    return None


def _overflows(node: ir.Node, analysis: PrecisionAnalysis) -> str | None:
    limit = analysis.half.max / analysis.range_margin
    for value in analysis.tensors(node):
        magnitude = analysis.magnitude(value) or 0.0
        if value in analysis.constant_magnitudes:
            continue
        if magnitude > limit:
            return f"`{value.name}` reached {magnitude:.4g}, the limit is {limit:.4g}"
        has_cube = node.op_type == "Gelu" and value is node.inputs[0]
        if has_cube and node.attributes.get_string("approximate") == "tanh" and magnitude**3 > limit:
            return f"the cube of `{value.name}` reached {magnitude**3:.4g}, the limit is {limit:.4g}"
    return None


SUM_OPS = ACCUMULATING_REDUCE_OPS | frozenset(
    "CumSum CumProd MeanVarianceNormalization LpNormalization LpPool GlobalLpPool LRN DFT STFT".split()
)
_SEQUENCE_LENS_INPUT = 4
"""The index of the input `sequence_lens` of LSTM, GRU and RNN."""
_MAX_VISITED_TENSORS = 64
"""The maximum number of tensors to search upstream of a softmax for the MatMul that produces the scores."""
_PASS_THROUGH_OPS = LAYOUT_OPS | frozenset("Add Sub Mul Div Where Max Min Clip Cast Concat Tanh".split())

PRECISION_RULES: tuple[PrecisionRule, ...] = (
    PrecisionRule("sum", "a sum needs more digits than its terms, and overflows before the mean does", SUM_OPS),
    PrecisionRule("statistic", "means and variances of small values underflow", predicate=_is_statistic),
    PrecisionRule("power", "a power may overflow unless its range was measured", frozenset({"Pow"}), _is_power),
    PrecisionRule(
        "exponential",
        "e^x overflows fp16 for x above 11, and the rounding error of x is amplified",
        frozenset(["Exp", "Softplus", "Sinh", "Cosh"]),
    ),
    PrecisionRule("angle", "an angle of many periods loses its phase to rounding", frozenset(["Sin", "Cos", "Tan"])),
    PrecisionRule(
        "position",
        "it computes positions, and integers are inexact above 2048 (fp16) or 256 (bf16)",
        predicate=_is_positional,
    ),
    PrecisionRule(
        "softmax",
        "its input is not attention scores, and its sums need more digits",
        frozenset(["Softmax", "LogSoftmax"]),
        _is_non_attention_softmax,
    ),
    PrecisionRule(
        "order", "rounding creates ties, and ties change the order", frozenset(["TopK", "NonMaxSuppression", "Unique"])
    ),
    PrecisionRule(
        "coordinate", "coordinates need more digits", frozenset(["GridSample", "RoiAlign", "MaxRoiPool", "AffineGrid"])
    ),
    PrecisionRule(
        "lengths",
        "TensorRT builds recurrent nodes with sequence lengths in fp32 only: it fills padding with fp32 zeros",
        frozenset(["LSTM", "GRU", "RNN"]),
        _has_sequence_lengths,
    ),
    PrecisionRule(
        "random",
        "the random values would differ",
        RANDOM_OPS,
    ),
    PrecisionRule(
        "quantized", "quantization scales stay fp32", frozenset(["QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"])
    ),
    PrecisionRule("dequantized", "its input is dequantized with an fp32 scale", predicate=_is_dequantized),
    PrecisionRule("weight", "a constant is out of range", predicate=_is_out_of_range),
    PrecisionRule("underflow", "its values are below the smallest normal value", predicate=_underflows),
    PrecisionRule("overflow", "its measured range is too large", predicate=_overflows),
)
"""The rules, for nodes whose op supports half precision in the opset of the model; the first rule that applies is reported.

A measured magnitude times `range_margin` must stay below the largest value of the type. Computations that TensorRT does in fp32
for any tensor type (the statistics of LayerNormalization, RMSNormalization, InstanceNormalization and GroupNormalization, the
softmax of an attention) are only subject to the rules on measured ranges.
"""
