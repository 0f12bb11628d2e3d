"""Decoder recognition: matches attention by structure, and identifies masks and positions by running them on small inputs."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ryzen_compile.backends.traits import portable_backend
from ryzen_compile.ir.analysis.constants import constant_tensor, int_attribute
from ryzen_compile.ir.analysis.op_traits import CONVERSION_OPS
from ryzen_compile.ir.edit.builder import ModelInfo
from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.ir.patterns import PatternNotMatched
from ryzen_compile.spec.interface import InputSpec, Interface
from ryzen_compile.spec.kv_cache import PositionEncoding
from ryzen_compile.spec.passes import Change, PassContext
from ryzen_passes.attention_fusion import MASK_FILL_THRESHOLD, AttentionMatcher, fuse_attention
from ryzen_passes.fold import Fold
from ryzen_passes.kv.recognition.recognized_decoder import (
    AttentionLayer,
    KVTensor,
    PositionTensor,
    RecognizedDecoder,
    Visibility,
)
from ryzen_passes.legalize_msft import legalize_contrib_ops
from ryzen_passes.position_subgraph import Array, PositionSubgraph, ProbeError, ProbeSizeError
from ryzen_passes.symbolic_shapes import infer_symbolic_shapes

_OPSET = 24
_MAX_PROBE_LENGTH, _MAX_SQUARE_PROBE_LENGTH = 1 << 20, 1 << 12
"""Sequence lengths at which sliding windows are detected, with caches and without (square masks)."""
_INTEGER_TYPES = (ir.DataType.INT64, ir.DataType.INT32)
_PROBE_SIZES = ((2, 3, 5), (1, 1, 7), (2, 4, 0))
"""(batch, seq, past) at which masks and positions are probed."""


def recognize(model: ir.Model) -> RecognizedDecoder:
    """Return the decoder in `model`, which is folded and whose attention is fused into ONNX Attention nodes, in place.

    Raises PatternNotMatched if the model does not match the expected patterns.
    """
    legalize_contrib_ops(model)
    interface = interface_of(model)
    Fold().rewrite(model, PassContext(backend=portable_backend()))
    infer_symbolic_shapes(model, interface)
    model_info = ModelInfo(model)
    change = fuse_attention(model_info, _OPSET)
    attentions = [node for node in model.graph if node.op_type == "Attention" and node.domain == ""]
    if not attentions:
        raise _attention_not_found(model, change)
    for node in attentions:
        node.name = node.name or model_info.names.allocate("attention")
    return _DecoderRecognizer(model, interface, model_info).recognize(attentions)


def _attention_not_found(model: ir.Model, change: Change) -> PatternNotMatched:
    """Return the error for a model in which no attention is recognized."""
    for node in model.graph:
        if node.op_type.endswith("Attention"):
            reason = f"attention is the op {node.op_type} of the domain `{node.domain}`, which is not supported"
            return PatternNotMatched(
                reason, node.name or node.op_type, hint="export the model with standard ONNX ops: torch.onnx or Optimum"
            )
    softmax = next((node for node in model.graph if node.op_type == "Softmax"), None)
    location = (softmax.name if softmax is not None else model.graph.name) or "the graph"
    return PatternNotMatched(f"no attention found: {change.notes[0] if change.notes else change.summary}", location)


class _DecoderRecognizer:
    def __init__(self, model: ir.Model, interface: Interface, model_info: ModelInfo) -> None:
        self.model, self.interface, self.model_info = model, interface, model_info
        self.sizes = model_info.shapes
        self.matcher = AttentionMatcher(model_info.shapes)
        self.states = {state.input: state for state in interface.states if state.append_axis is not None}
        self.position_subgraph = PositionSubgraph(model, interface, model_info.shapes)
        self.ids = self._find_ids()
        self.mask = next((spec for spec in interface.inputs if spec.role == "mask"), None)
        self._visibility_by_mask: dict[ir.Value, Visibility] = {}
        self.probed_length = _MAX_PROBE_LENGTH

    def recognize(self, attentions: list[ir.Node]) -> RecognizedDecoder:
        layers = [self._recognize_layer(node) for node in attentions]
        used = {tensor.state.input for layer in layers for tensor in (layer.key, layer.value) if tensor.state is not None}
        if unused := [name for name in self.states if name not in used]:
            raise PatternNotMatched("the cache is not an input of any recognized attention layer", unused[0])
        position_inputs, encoding, max_positions = self._find_position_inputs(layers)
        return RecognizedDecoder(
            model=self.model,
            interface=self.interface,
            position_subgraph=self.position_subgraph,
            layers=layers,
            ids=self.ids,
            mask=self.mask,
            position_inputs=position_inputs,
            position_encoding=encoding,
            max_positions=max_positions,
            probed_length=self.probed_length,
        )

    def _find_ids(self) -> InputSpec:
        matches = [spec for spec in self.interface.inputs if spec.role == "ids" and spec.dims and len(spec.dims) == 2]
        if len(matches) != 1:
            raise PatternNotMatched(
                "expected exactly one input of token ids (batch, seq)" + (f", found {len(matches)}" if matches else ""),
                ", ".join(spec.name for spec in matches) or "the inputs",
            )
        return matches[0]

    # Layers

    def _recognize_layer(self, node: ir.Node) -> AttentionLayer:
        location = node.name or "Attention"
        if int_attribute(node, "qk_matmul_output_mode", 0) and len(node.outputs) > 3:
            raise PatternNotMatched("attention scores are an output of the node, so no key may be removed", location)
        query, key, value = (node.inputs[index] for index in range(3))
        dims = self.sizes.dims(query) if query is not None else None
        if query is None or key is None or value is None or dims is None or len(dims) != 4 or not isinstance(dims[1], int):
            raise PatternNotMatched("expected queries of shape (batch, heads, seq, head_size)", location)
        key_tensor, value_tensor = self._recognize_kv_tensor(key, location), self._recognize_kv_tensor(value, location)
        kv_heads = self._kv_head_count(key_tensor.cache, location)
        return AttentionLayer(
            attention=node,
            key=key_tensor,
            value=value_tensor,
            heads=dims[1],
            kv_heads=kv_heads,
            visibility=self._recognize_visibility(node, key_tensor, location),
        )

    def _kv_head_count(self, cache: ir.Value, location: str) -> int:
        dims = self.sizes.dims(cache)
        if dims is None or len(dims) != 4 or not isinstance(dims[1], int):
            raise PatternNotMatched(
                f"expected keys of shape (batch, kv_heads, rows, head_size), `{cache.name}` has {self.sizes.describe(dims)}",
                location,
            )
        return dims[1]

    def _recognize_kv_tensor(self, attended: ir.Value, location: str) -> KVTensor:
        cache = attended
        for _ in range(8):
            cache = self._skip_pass_through(cache)
            unrepeated = self.matcher.before_repeat_kv(cache)
            if unrepeated is None:
                break
            cache = unrepeated
        dims = self.sizes.dims(cache)
        if dims is None or len(dims) != 4 or not isinstance(dims[3], int):
            raise PatternNotMatched(
                f"expected shape (batch, kv_heads, rows, head_size), `{cache.name}` has {self.sizes.describe(dims)}", location
            )
        dtype = self.model_info.types[cache]
        node = cache.producer()
        if node is not None and node.op_type == "Concat" and len(node.inputs) == 2:
            past, update = node.inputs
            state = self.states.get(past.name or "") if past is not None else None
            if state is not None and update is not None and state.append_axis == int_attribute(node, "axis", 0) % 4 == 2:
                return KVTensor(state=state, update=update, cache=cache, head_size=dims[3], dtype=dtype)
        if self.states:
            raise PatternNotMatched(
                "expected a Concat of a cache and the step's keys or values along axis 2",
                location if node is None else node.name or location,
            )
        return KVTensor(state=None, update=cache, cache=cache, head_size=dims[3], dtype=dtype)

    def _skip_pass_through(self, value: ir.Value) -> ir.Value:
        node = value.producer()
        while node is not None and node.op_type in CONVERSION_OPS and node.inputs[0] is not None:
            value = node.inputs[0]
            node = value.producer()
        return value

    # Masks

    def _recognize_visibility(self, node: ir.Node, key: KVTensor, location: str) -> Visibility:
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        is_causal = bool(int_attribute(node, "is_causal", 0))
        if mask is None:
            if is_causal and key.state is None:
                return Visibility(window=None, padding=False)
            raise PatternNotMatched(
                "attention has no mask and is not causal, so the model is not a decoder"
                if not is_causal
                else "`is_causal` aligns its mask at the upper left, which is not causal over a past cache",
                location,
            )
        if is_causal:
            raise PatternNotMatched("attention has both `is_causal` and a mask", location)
        if mask not in self._visibility_by_mask:
            self._visibility_by_mask[mask] = self._probe_visibility(mask, location)
        return self._visibility_by_mask[mask]

    def _probe_visibility(self, mask: ir.Value, location: str) -> Visibility:
        if mask not in self.position_subgraph.step_dependent:
            raise PatternNotMatched(
                f"the attention mask `{mask.name}` depends on more than sizes, mask inputs and positions", location
            )
        try:
            padding = self.mask is not None and not self._ignores_padding(mask)
            slopes = self._probe_alibi_slopes(mask)
            window = self._probe_window(mask, location, slopes)
            for batch, seq, past in self._probe_sizes():
                for padding_tokens in (0, 2) if padding else (0,):
                    mask_values = self._evaluate_mask_if_defined(mask, batch, seq, past, padding_tokens)
                    if mask_values is not None:
                        self._check_causal(mask_values, location, (batch, seq, past), padding_tokens, window, slopes)
        except ProbeError as error:
            raise PatternNotMatched(f"the attention mask cannot be evaluated: {error}", location) from None
        return Visibility(window=window, padding=padding, alibi_slopes=slopes)

    def _probe_sizes(self) -> Iterator[tuple[int, int, int]]:
        for batch, seq, past in _PROBE_SIZES:
            yield batch, seq, past if self.states else 0

    def _visible_keys(self, mask: ir.Value, batch: int, seq: int, past: int, padding_tokens: int = 0) -> Array:
        """Return (batch, heads or 1, seq, past+seq) bool: the visible keys, if row 0 starts with `padding_tokens`."""
        return _to_bool_mask(self._evaluate_mask(mask, batch, seq, past, padding_tokens))

    def _evaluate_mask(self, mask: ir.Value, batch: int, seq: int, past: int, padding_tokens: int = 0) -> Array:
        """Return the values of `mask` for that step, (batch, heads or 1, seq, past+seq)."""
        values = self.position_subgraph.run(mask, *self.probe_inputs(batch, seq, past, padding_tokens))
        return np.broadcast_to(values, np.broadcast_shapes(values.shape, (batch, 1, seq, past + seq)))

    def _evaluate_mask_if_defined(self, mask: ir.Value, batch: int, seq: int, past: int, padding_tokens: int) -> Array | None:
        """Return the values of `mask`, or None if it cannot be run for several tokens after a past, which is not required."""
        try:
            return self._evaluate_mask(mask, batch, seq, past, padding_tokens)
        except ProbeSizeError:
            if seq == 1 or past == 0:
                raise
            return None

    def _probe_alibi_slopes(self, mask: ir.Value) -> tuple[float, ...]:
        """Return the increase of the bias per key position for each head (ALiBi), or () if there are no biases."""
        last = self._evaluate_mask(mask, 1, 2, 0)[0, :, -1]
        slopes = last[:, 1] - last[:, 0] if last.dtype != np.bool_ else np.zeros(1)
        return tuple(map(float, slopes)) if slopes.any() else ()

    def probe_inputs(
        self, batch: int, seq: int, past: int, padding_tokens: int = 0
    ) -> tuple[dict[str, int], dict[ir.Value, Array]]:
        """Return the sizes of the named dims and the inputs of the position subgraph for one step."""
        sizes: dict[str, int] = {}
        values: dict[ir.Value, Array] = {}
        for value, spec in zip(
            (value for value in self.model.graph.inputs if not value.is_initializer()), self.interface.inputs, strict=True
        ):
            shape: tuple[int, ...] = ()
            if spec.role == "state" and spec.name in self.states and spec.dims is not None:
                shape = tuple(
                    batch if axis == 0 else past if axis == self.states[spec.name].append_axis else -1
                    for axis in range(len(spec.dims))
                )
            elif spec.role == "ids":
                shape = (batch, seq)
            elif spec.role == "mask":
                shape = (batch, past + seq)
                array = np.ones(shape, spec.dtype)
                array[0, :padding_tokens] = 0
                values[value] = array
            elif spec.role == "positions":
                shape = (batch, seq)
                array = np.broadcast_to(past + np.arange(seq), shape).astype(spec.dtype)
                if padding_tokens:
                    array = array.copy()
                    array[0] = np.maximum(array[0] - padding_tokens, 0)
                values[value] = array
            for dim, size in zip(spec.dims or (), shape, strict=False):
                if isinstance(dim, str) and size >= 0:
                    sizes.setdefault(dim, size)
        return sizes, values

    def _ignores_padding(self, mask: ir.Value) -> bool:
        batch, seq, past = _PROBE_SIZES[-1]
        return bool(np.array_equal(self._visible_keys(mask, batch, seq, past), self._visible_keys(mask, batch, seq, past, 2)))

    def _probe_window(self, mask: ir.Value, location: str, slopes: tuple[float, ...]) -> int | None:
        """Return the size of the sliding window, or None if a query attends to all keys before it.

        Raises PatternNotMatched if heads differ in their windows, or a window has gaps.
        """
        # The length is divided by the number of heads to bound the size of the evaluated mask.
        heads = self._evaluate_mask(mask, 1, 1, 0).shape[1]
        length = _MAX_PROBE_LENGTH // heads if self.states else int(_MAX_SQUARE_PROBE_LENGTH / heads**0.5)
        if slopes:
            length = min(length, int(-MASK_FILL_THRESHOLD / 2 / max(map(abs, slopes))))
        while True:
            past, seq = (length - 1, 1) if self.states else (0, length)
            try:
                last = self._evaluate_mask(mask, 1, seq, past)[:, :, -1:]
                break
            except ProbeError:
                if length < 64:
                    raise
                length //= 2
        self.probed_length = min(self.probed_length, length)
        visible = _to_bool_mask(last)
        counts = {int(count) for count in visible.sum(axis=3).flat}
        count = counts.pop()
        if counts or not visible[..., length - count :].all():
            raise PatternNotMatched("heads attend to different keys, or to keys with gaps between them", location)
        self._check_alibi_biases(last, visible, slopes, location)
        return None if count == length else count

    def _check_causal(
        self,
        mask_values: Array,
        location: str,
        probe_size: tuple[int, int, int],
        padding_tokens: int,
        window: int | None,
        slopes: tuple[float, ...],
    ) -> None:
        """Check that `mask_values` (batch, heads or 1, seq, past+seq) of a step are causal within `window`.

        Raises PatternNotMatched if they are not.
        """
        batch, seq, past = probe_size
        visible = _to_bool_mask(mask_values)
        key, query = np.arange(past + seq), past + np.arange(seq)[:, None]
        expected = np.broadcast_to(
            (key <= query) & (key > query - (window or past + seq + 1)), (batch, 1, seq, past + seq)
        ).copy()
        expected[0, :, :, :padding_tokens] = False
        is_token = np.ones((batch, seq), bool)
        is_token[0] = query[:, 0] >= padding_tokens
        if np.any((visible != expected) & is_token[:, None, :, None]):
            raise PatternNotMatched(
                f"expected a causal mask{f' over {window} tokens' if window else ''}, the mask differs from it "
                f"for {seq} queries after {past} tokens{f', {padding_tokens} of them padding' if padding_tokens else ''}",
                location,
            )
        self._check_alibi_biases(mask_values, visible & is_token[:, None, :, None], slopes, location)

    def _check_alibi_biases(self, mask_values: Array, visible: Array, slopes: tuple[float, ...], location: str) -> None:
        """Check that the biases of `visible` keys are linear in the key position, with the slope of each head.

        Raises PatternNotMatched if they are not.
        """
        if mask_values.dtype == np.bool_:
            return
        not_linear = "attention scores have a bias with no slope that is constant over the key positions"
        biases = np.where(visible, mask_values, 0)
        if not np.isfinite(biases).all() or not np.isfinite(slopes).all():
            raise PatternNotMatched(not_linear, location)
        key = np.arange(mask_values.shape[3])
        last = np.where(visible, key, 0).max(axis=3, keepdims=True)
        expected = np.take_along_axis(biases, last, axis=3) - np.array(slopes or (0,))[:, None, None] * (last - key)
        scale = np.maximum(np.abs(biases).max(axis=3, keepdims=True), 1).astype(np.float64)
        tolerance = max(1e-5, 4 * float(ml_dtypes.finfo(mask_values.dtype).eps)) * scale  # type: ignore[no-untyped-call]
        if np.any(np.where(visible, np.abs(biases - expected), 0) > tolerance):
            raise PatternNotMatched(not_linear, location)

    # Positions

    def _find_position_inputs(self, layers: list[AttentionLayer]) -> tuple[list[PositionTensor], PositionEncoding, int | None]:
        """Return the position tensors, the position encoding, and the length of a position table, if any."""
        masks = {layer.attention.inputs[3] for layer in layers if len(layer.attention.inputs) > 3}
        dead = self._dead_repeat_sizes(layers)
        position_tensors: dict[ir.Value, PositionTensor] = {}
        encoding: PositionEncoding = "alibi" if any(layer.visibility.alibi_slopes for layer in layers) else "none"
        max_positions = None
        for boundary in self.position_subgraph.boundary_values():
            if boundary in masks or boundary in dead:
                continue
            value = self._find_position_tensor(boundary)
            position_tensors[value] = PositionTensor(
                value,
                self.position_subgraph.run(value, *self.probe_inputs(1, 3, 5 if self.states else 0)).ndim,
                self._seq_axis(value),
            )
            table_length = self._position_table_length(boundary)
            if table_length is not None:
                encoding, max_positions = "learned" if encoding != "alibi" else encoding, table_length
            elif encoding == "none":
                encoding = "rope"
        return list(position_tensors.values()), encoding, max_positions

    def _dead_repeat_sizes(self, layers: list[AttentionLayer]) -> set[ir.Value]:
        """Return the values that only nodes between a cache and its attention read, or nodes whose outputs are only measured.

        Rewrites remove these nodes. The outputs of the latter are read by Shape nodes only, which give the lengths of masks.
        """
        dead_nodes: set[ir.Node] = set()
        for layer in layers:
            for index, tensor in ((1, layer.key), (2, layer.value)):
                value = layer.attention.inputs[index]
                while value is not None and value is not tensor.cache and (node := value.producer()) is not None:
                    dead_nodes.add(node)
                    value = node.inputs[0]
        return {
            value
            for value in self.position_subgraph.boundary_values()
            if all(
                node in dead_nodes or _is_only_measured(node)
                for node in value.consumers()
                if any(output not in self.position_subgraph.step_dependent for output in node.outputs)
            )
        }

    def _position_table_length(self, boundary: ir.Value) -> int | None:
        """Return the number of rows of the position table if `boundary` is a lookup in one, else None."""
        node = boundary.producer()
        if node is None or node.op_type != "Gather":
            return None
        table = constant_tensor(node.inputs[0])
        return int(table.numpy().shape[0]) if table is not None and len(table.shape) == 2 else None

    def _find_position_tensor(self, boundary: ir.Value) -> ir.Value:
        """Return the position tensor nearest to `boundary` among its inputs; raises PatternNotMatched if there is none."""
        pending, visited = [boundary], {boundary}
        while pending:
            value = pending.pop(0)
            if (
                self.model_info.types.get(value) in _INTEGER_TYPES
                and self._holds_positions(value)
                and self._is_row_independent(value, boundary)
            ):
                return value
            node = value.producer()
            for operand in node.inputs if node is not None else ():
                if operand is not None and self.position_subgraph.step_dependent.get(operand) and operand not in visited:
                    visited.add(operand)
                    pending.append(operand)
        raise PatternNotMatched(
            f"`{boundary.name}` changes from step to step, but does not depend on token positions alone",
            (boundary.producer() or boundary).name or "",
        )

    def _holds_positions(self, value: ir.Value) -> bool:
        """Return whether `value` holds the positions of the step's tokens along one axis; axis 0 may be the batch."""
        try:
            for batch, seq, past in self._probe_sizes():
                values = self.position_subgraph.run(value, *self.probe_inputs(batch, seq, past))
                shape = [1] * values.ndim
                shape[self._seq_axis(value)] = seq
                expected = np.reshape(past + np.arange(seq), shape)
                if values.shape[1:] != expected.shape[1:] or values.shape[:1] not in ((1,), (batch,)) and values.ndim > 1:
                    return False
                if not (values == expected).all():
                    return False
        except ProbeError:
            return False
        return True

    def _seq_axis(self, value: ir.Value) -> int:
        """Return the axis of `value` that has the length of the step; raises ProbeError if there is none."""
        shape = self.position_subgraph.run(value, *self.probe_inputs(1, 3, 5 if self.states else 0)).shape
        if sorted(shape)[-1:] != [3] or np.prod(shape) != 3:
            raise ProbeError(f"`{value.name}` has no axis of the length of the step")
        return int(shape.index(3))

    def _is_row_independent(self, value: ir.Value, boundary: ir.Value) -> bool:
        """Return whether each row of `boundary` along axis 0 depends on the same row of positions in `value` only."""
        batch, seq, past = 3, 4, 9 if self.states else 0
        sizes, inputs = self.probe_inputs(batch, seq, past)
        try:
            rank, axis = self.position_subgraph.run(value, sizes, inputs).ndim, self._seq_axis(value)
            if rank < 2 and self._position_table_length(boundary) is None:
                return False
            shape = [batch, *(1,) * max(rank - 1, 1)]
            shape[max(axis, 1)] = seq
            rows = np.random.default_rng(0).integers(0, past + seq, shape).astype(self.model_info.types[value].numpy())
            batched = self.position_subgraph.run(boundary, sizes, {**inputs, value: rows})
            by_row = [
                self.position_subgraph.run(boundary, self.probe_inputs(1, seq, past)[0], {**inputs, value: rows[row : row + 1]})
                for row in range(batch)
            ]
        except ProbeError:
            return False
        return batched.shape[:1] == (batch,) and np.array_equal(batched, np.concatenate(by_row))


def _is_only_measured(node: ir.Node) -> bool:
    """Return whether the outputs of `node`, and of all nodes that derive from them, are read by Shape and Size nodes only."""
    pending, visited = [node], {node}
    while pending:
        current = pending.pop()
        if any(output.is_graph_output() for output in current.outputs):
            return False
        readers = {consumer for output in current.outputs for consumer in output.consumers()} - visited
        derived = [reader for reader in readers if reader.op_type not in ("Shape", "Size") or reader.domain != ""]
        visited.update(derived)
        pending += derived
    return True


def _to_bool_mask(mask: Array) -> Array:
    """Return the keys that `mask` leaves visible; it is a condition or an additive bias."""
    return mask if mask.dtype == np.bool_ else mask > MASK_FILL_THRESHOLD
