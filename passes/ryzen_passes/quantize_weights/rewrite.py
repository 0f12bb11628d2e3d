"""Replace weights by their codes and scales, in the form that the backend computes with."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from ryzen_compile.ir.edit.builder import ModelInfo, NodeBuilder, replace_value
from ryzen_compile.spec.passes import Change, PassContext, Refusal
from ryzen_passes.opset import raise_opset
from ryzen_passes.product_inputs import measure_product_inputs
from ryzen_passes.quantize_weights.calibrated import quantize_compensated
from ryzen_passes.quantize_weights.codes import FORMATS, Array, Blocks, CodeFormat, PackedPairs, QuantizedWeight, quantize
from ryzen_passes.weight_sites import SkippedWeight, WeightRead, WeightSite, find_weights

_BLOCKED_OPSET = 21
"""The opset in which DequantizeLinear has blocks and codes of 4 bits."""
_FLOAT8_OPSET = 19
_PER_CHANNEL_OPSET = 13
_WORST_ERRORS = 10
"""The number of weights whose errors are noted."""


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """The codes that the pass writes."""

    code_format: CodeFormat
    block: int
    """The elements of a block; 0: the default of the format."""
    algorithm: Literal["rtn", "search", "gptq"]
    """As the option of the pass."""
    folds: bool
    """Whether the graph computes weights from codes by Cast and Mul, which the backend evaluates when it loads the graph."""


def quantize_weights(
    model: ir.Model, weight_format: WeightFormat, skip: Sequence[str], context: PassContext
) -> Change | Refusal:
    """Quantize the weights of `model` in place, except those that a node reads whose name or op type matches `skip`."""
    plans, notes = plan_weights(model, weight_format, skip)
    if isinstance(plans, Refusal):
        return plans
    moments: dict[str, Array] = {}
    if weight_format.algorithm == "gptq":
        measured = measure_product_inputs(model, [item.site for item in plans], context, alternative="algorithm=search")
        if isinstance(measured, Refusal):
            return measured
        moments = measured
    results = list[tuple[WeightPlan, QuantizedWeight]]()
    for item in plans:
        inputs = moments.get(str(item.site.weight.name))
        if inputs is not None:
            quantized = quantize_compensated(item, inputs)
        else:
            quantized = quantize(item.tensor, item.blocks, item.code_format, searches=weight_format.algorithm != "rtn")
        if quantized is None:
            notes.append(f"{item.site.weight.name}: it has an element that is not finite")
        else:
            results.append((item, quantized))
    if not results:
        return _nothing_to_quantize(model, notes)
    needed = max(_needed_opset(item, folds=weight_format.folds) for item, _ in results)
    if (reason := raise_opset(model, needed)) is not None:
        return Refusal(reason=f"its weights need opset {needed}: {reason}", location=model.graph.name or "the graph")
    rewriter = _Rewriter(model, folds=weight_format.folds)
    for item, quantized in results:
        rewriter.replace(item, quantized)
    return rewriter.change(notes)


def _nothing_to_quantize(model: ir.Model, notes: Sequence[str]) -> Refusal:
    reason = "it has no weight that can be quantized" + (f": {notes[0]}" if notes else "")
    return Refusal(reason=reason, location=model.graph.name or "the graph")


@dataclass(frozen=True, kw_only=True)
class WeightPlan:
    """How one weight is quantized."""

    site: WeightSite
    code_format: CodeFormat
    blocks: Blocks

    @property
    def tensor(self) -> ir.TensorProtocol:
        """The values of the weight."""
        return self.site.tensor

    @property
    def is_per_channel(self) -> bool:
        """Whether a vector of scales, one for each channel, describes the weight."""
        return self.blocks.size == self.blocks.length and (self.site.is_convolution or len(self.tensor.shape) == 2)

    @property
    def channel_axis(self) -> int:
        """The axis of the vector of scales."""
        return 0 if self.site.is_convolution else 1 - self.site.axis

    @property
    def saved_bytes(self) -> int:
        """The bytes by which codes and scales are smaller than the weight."""
        scales = math.prod(self.blocks.scale_shape) * self.tensor.dtype.itemsize
        return self.tensor.nbytes - math.ceil(self.blocks.elements * self.code_format.dtype.bitwidth / 8) - int(scales)


def plan_weights(
    model: ir.Model, weight_format: WeightFormat, skip: Sequence[str]
) -> tuple[list[WeightPlan] | Refusal, list[str]]:
    """Return what to do with each weight of `model`, or why nothing can be done, and the weights that are left with reasons."""
    plans: list[WeightPlan] = []
    notes: list[str] = []
    for item in find_weights(model, skip):
        outcome = item.reason if isinstance(item, SkippedWeight) else _plan_site(item, weight_format)
        if isinstance(outcome, Refusal):
            return outcome, notes
        if isinstance(outcome, WeightPlan):
            plans.append(outcome)
        else:
            notes.append(f"{item.weight.name}: {outcome}")
    if plans:
        return plans, notes
    return _nothing_to_quantize(model, notes), notes


def _plan_site(site: WeightSite, weight_format: WeightFormat) -> WeightPlan | Refusal | str:
    """Return the plan for a weight, why it is left, or why the pass cannot run with the block that the user chose."""
    code_format = weight_format.code_format
    shape = site.tensor.shape.numpy()
    is_lookup = any(read.kind == "lookup" for read in site.reads)
    if code_format.dtype == ir.DataType.FLOAT8E4M3FN and is_lookup:
        code_format = FORMATS["int8"]  # no runtime looks up rows of float8
    if site.is_convolution:
        if code_format.dtype == ir.DataType.INT4:
            return "convolutions have no codes of 4 bits"
        length = math.prod(shape[1:])
        return WeightPlan(
            site=site, code_format=code_format, blocks=Blocks(leading=shape[0], length=length, trailing=1, size=length)
        )
    length = shape[site.axis]
    block = weight_format.block or _default_block(code_format, length)
    if length % block:
        return Refusal(
            reason=f"{length} elements that a product sums over cannot be divided into blocks of {block}",
            location=site.weight.name or "a weight",
            hint="choose a block that divides them, or leave the weight out with `skip`",
        )
    if code_format.dtype == ir.DataType.INT4 and (shape[-1] % 2 or block % 2):
        return "its codes of 4 bits do not fill bytes"
    if is_lookup and (block != length or code_format.dtype == ir.DataType.INT4):
        unknown = [read.node for read in site.reads if read.kind == "lookup" and _rank(read.node.inputs[1]) is None]
        if unknown:
            return f"the rank of the indices of `{unknown[0].name or unknown[0].op_type}` is unknown"
    blocks = Blocks(
        leading=math.prod(shape[: site.axis]), length=length, trailing=math.prod(shape[site.axis + 1 :]), size=block
    )
    return WeightPlan(site=site, code_format=code_format, blocks=blocks)


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def _default_block(code_format: CodeFormat, length: int) -> int:
    """Return 32 for codes of 4 bits if it divides `length`, else all elements that a product sums over."""
    return 32 if code_format.dtype == ir.DataType.INT4 and length % 32 == 0 else length


def _needed_opset(item: WeightPlan, *, folds: bool) -> int:
    if item.code_format.dtype == ir.DataType.FLOAT8E4M3FN:
        return _FLOAT8_OPSET if item.is_per_channel or folds else _BLOCKED_OPSET
    needs_blocks = not item.is_per_channel or item.code_format.dtype == ir.DataType.INT4
    return _BLOCKED_OPSET if needs_blocks and not folds else _PER_CHANNEL_OPSET


def _scale_tensor(item: WeightPlan, scales: Array, *, folds: bool) -> ir.TensorProtocol:
    """Return the scales in the type of the weight: a vector for channels, else the shape of the weight with one per block."""
    shape = [*item.tensor.shape.numpy()]
    if item.site.is_convolution or (item.is_per_channel and not folds):
        shape = [-1]
    else:
        shape[item.site.axis] //= item.blocks.size
    return ir.Tensor(scales.reshape(shape).astype(item.tensor.dtype.numpy()), dtype=item.tensor.dtype)


class _Rewriter:
    """Replaces weights one by one."""

    def __init__(self, model: ir.Model, *, folds: bool) -> None:
        self._graph, self._folds = model.graph, folds
        info = ModelInfo(model)
        self._names = info.names
        self._builder = NodeBuilder(model.graph, info)
        self._errors: list[tuple[float, str]] = []
        self._changed: list[str] = []
        self._bytes_before = 0
        self._bytes_saved = 0
        self._formats: set[str] = set()

    def replace(self, item: WeightPlan, quantized: QuantizedWeight) -> None:
        """Let the readers of a weight read its codes and scales."""
        weight = item.site.weight
        self._errors.append((quantized.relative_error, weight.name or ""))
        self._changed += [read.node.name or read.node.op_type for read in item.site.reads]
        self._bytes_before += item.tensor.nbytes
        self._bytes_saved += item.saved_bytes
        self._formats.add(item.code_format.name)
        # A backend that keeps codes looks up rows of codes itself; one that folds would compute the weight to look up rows.
        lookups = [read for read in item.site.reads if read.kind == "lookup" and self._folds]
        others = [read for read in item.site.reads if read not in lookups]
        packs = self._folds and item.code_format.dtype == ir.DataType.INT4
        codes = self._initializer(
            PackedPairs(quantized.codes) if packs else quantized.codes, f"{weight.name}_{item.code_format.name}"
        )
        scales = self._initializer(_scale_tensor(item, quantized.scales, folds=self._folds), f"{weight.name}_scale")
        if others:
            compute = self._fold if self._folds else self._dequantize
            dense = compute(item, codes, scales, self._first(others))
            for read in others:
                read.node.replace_input_with(read.index, dense)
        for read in lookups:
            replace_value(read.node.outputs[0], self._look_up(read.node, item, codes, scales))
            self._graph.remove(read.node, safe=True)
        if not weight.uses():
            del self._graph.initializers[weight.name]  # type: ignore[arg-type]

    def change(self, notes: Sequence[str]) -> Change:
        """Return what was done."""
        worst = sorted(self._errors, reverse=True)[:_WORST_ERRORS]
        formats, share = " and ".join(sorted(self._formats)), self._bytes_saved / self._bytes_before
        return Change(
            inserted=tuple(self._builder.inserted),
            changed=tuple(dict.fromkeys(self._changed)),
            summary=f"{len(self._errors)} weights in {formats}: {self._bytes_before / 1e6:.1f} MB become {share:.0%} smaller; "
            f"relative error at most {worst[0][0]:.2%} (`{worst[0][1]}`)",
            notes=(*(f"{name}: relative error {error:.2%}" for error, name in worst), *notes),
        )

    def _first(self, reads: Sequence[WeightRead]) -> ir.Node:
        """Return the reader that comes first in the graph."""
        nodes = {read.node for read in reads}
        return next(node for node in self._graph if node in nodes)

    def _initializer(self, tensor: ir.TensorProtocol, name: str) -> ir.Value:
        name = self._names.allocate(name)
        tensor.name = name
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()))
        self._graph.register_initializer(value)
        self._builder.types[value] = tensor.dtype
        return value

    def _dequantize(self, item: WeightPlan, codes: ir.Value, scales: ir.Value, before: ir.Node) -> ir.Value:
        """Insert a DequantizeLinear before `before` that computes the weight, and return the weight."""
        attributes = {"axis": item.channel_axis if item.is_per_channel else item.site.axis}
        if not item.is_per_channel:
            attributes["block_size"] = item.blocks.size
        dtype, shape, prefix = item.tensor.dtype, ir.Shape(item.tensor.shape.numpy()), item.site.weight.name
        return self._builder.op(
            before, "DequantizeLinear", [codes, scales], attributes, dtype=dtype, shape=shape, name_prefix=prefix
        )

    def _fold(self, item: WeightPlan, codes: ir.Value, scales: ir.Value, before: ir.Node) -> ir.Value:
        """Insert nodes before `before` that compute the weight from constants, and return the weight."""
        op, vector = functools.partial(self._builder.op, before, name_prefix=item.site.weight.name), self._builder.int64_vector
        blocks, shape, dtype = item.blocks, tuple(item.tensor.shape.numpy()), item.tensor.dtype
        values = op("Cast", [codes], {"to": int(dtype)}, dtype=dtype)
        if item.code_format.dtype == ir.DataType.INT4:
            values = self._unpack(before, values, dtype)
        divided = (blocks.leading, blocks.length // blocks.size, blocks.size, blocks.trailing)
        values = op("Reshape", [values, vector(*divided)])
        factors = op("Reshape", [scales, vector(*blocks.scale_shape[:2], 1, blocks.trailing)])
        return op("Reshape", [op("Mul", [values, factors]), vector(*shape)], shape=ir.Shape(shape))

    def _look_up(self, gather: ir.Node, item: WeightPlan, codes: ir.Value, scales: ir.Value) -> ir.Value:
        """Insert nodes before `gather` that look up rows of codes and compute the rows of the weight from them."""
        op, vector = functools.partial(self._builder.op, gather), self._builder.int64_vector
        blocks, length, dtype = item.blocks, item.blocks.length, item.tensor.dtype
        indices = gather.inputs[1]
        values = op("Cast", [op("Gather", [codes, indices], {"axis": 0})], {"to": int(dtype)}, dtype=dtype)
        factors = op("Gather", [scales, indices], {"axis": 0})
        if item.code_format.dtype == ir.DataType.INT4:
            values = self._unpack(gather, values, dtype)
        elif blocks.size == length:
            return op("Mul", [values, factors])
        kept = [0] * (_rank(indices) or 0)  # Reshape copies the sizes of these axes
        values = op("Reshape", [values, vector(*kept, length // blocks.size, blocks.size)])
        products = op("Mul", [values, op("Unsqueeze", [factors, vector(-1)])])
        return op("Reshape", [products, vector(*kept, length)])

    def _unpack(self, before: ir.Node, packed: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Return the two codes in each byte of `packed`, as floats of integral value: the lower half first, on a new last axis.

        A byte is 16 high + low, with `high` in [-8, 7] and `low` in [0, 15], which stands for `low` - 16 from 8 on.
        """
        op, scalar = self._builder.op, self._builder.scalar
        high = op(before, "Floor", [op(before, "Mul", [packed, scalar(1 / 16, dtype)])])
        low = op(before, "Sub", [packed, op(before, "Mul", [high, scalar(16, dtype)])])
        wraps = op(before, "Floor", [op(before, "Mul", [low, scalar(1 / 8, dtype)])])
        low = op(before, "Sub", [low, op(before, "Mul", [wraps, scalar(16, dtype)])])
        last = self._builder.int64_vector(-1)
        halves = [op(before, "Unsqueeze", [half, last]) for half in (low, high)]
        return op(before, "Concat", halves, {"axis": -1})
