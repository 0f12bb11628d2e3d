"""Recognising a decoder: attention by structure, its mask and its positions by running them on small numbers."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.analysis.sizes import constant_tensor, int_attribute
from ryzen_compile.ir.edit.builder import ModelInfo
from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.spec.interface import InputSpec, Interface
from ryzen_compile.spec.kv_cache import PositionEncoding
from ryzen_compile.spec.passes import Change, PassContext
from ryzen_passes.attention.fuse import fuse_attention
from ryzen_passes.attention.match import MASK_FILL_THRESHOLD, AttentionMatcher
from ryzen_passes.fold import Fold
from ryzen_passes.kv.recognition.position_subgraph import Array, PositionSubgraph, ProbeError, ProbeSizeError
from ryzen_passes.kv.recognition.recognized_decoder import (
    AttentionLayer,
    KVTensor,
    PatternNotMatched,
    PositionTensor,
    RecognizedDecoder,
    Visibility,
)
from ryzen_passes.kv.recognition.symbolic_shapes import infer_symbolic_shapes
from ryzen_passes.legalize_msft import UnsupportedContribOp, legalize_contrib_ops

_OPSET = 24
_MAX_PROBE_LENGTH, _MAX_SQUARE_PROBE_LENGTH = 1 << 20, 1 << 12
"""A window is told from none by a query that has this many tokens before it; the second where masks are square."""
_INTEGER_TYPES = (ir.DataType.INT64, ir.DataType.INT32)
_PASS_THROUGH_OPS = frozenset({"Identity", "Cast"})
_PROBE_SIZES = ((2, 3, 5), (1, 1, 7), (2, 4, 0))
"""(batch, seq, past) at which masks and positions are looked at."""


def recognize(model: ir.Model) -> RecognizedDecoder:
    """Return the decoder that `model` is, folded and its attention raised to ONNX Attention in place. Raises Unrecognised."""
    try:
        legalize_contrib_ops(model)
    except UnsupportedContribOp as foreign:
        raise PatternNotMatched(str(foreign), foreign.location) from None
    interface = interface_of(model)
    Fold().rewrite(model, PassContext(backend="onnxruntime"))
    infer_symbolic_shapes(model, interface)
    known = ModelInfo(model)
    change = fuse_attention(known, _OPSET)
    attentions = [node for node in model.graph if node.op_type == "Attention" and node.domain == ""]
    if not attentions:
        raise _attention_not_found(model, change)
    for node in attentions:
        node.name = node.name or known.names.allocate("attention")
    return _DecoderRecognizer(model, interface, known).recognize(attentions)


def _attention_not_found(model: ir.Model, change: Change) -> PatternNotMatched:
    """Return why no attention was found."""
    for node in model.graph:
        if node.op_type.endswith("Attention"):
            says = f"its attention is the operator {node.op_type} of the domain `{node.domain}`"
            return PatternNotMatched(
                says, node.name or node.op_type, hint="export it with ops of ONNX's own: torch.onnx, or Optimum"
            )
    softmax = next((node for node in model.graph if node.op_type == "Softmax"), None)
    where = (softmax.name if softmax is not None else model.graph.name) or "the graph"
    return PatternNotMatched(f"no attention was found: {change.notes[0] if change.notes else change.summary}", where)


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
        used = {side.state.input for layer in layers for side in (layer.key, layer.value) if side.state is not None}
        if lost := [name for name in self.states if name not in used]:
            raise PatternNotMatched("the cache is not read by any attention that was found", lost[0])
        clocks, style, longest = self._find_position_inputs(layers)
        return RecognizedDecoder(
            model=self.model,
            interface=self.interface,
            position_subgraph=self.position_subgraph,
            layers=layers,
            ids=self.ids,
            mask=self.mask,
            position_inputs=clocks,
            position_encoding=style,
            max_positions=longest,
            probed_length=self.probed_length,
        )

    def _find_ids(self) -> InputSpec:
        found = [spec for spec in self.interface.inputs if spec.role == "ids" and spec.dims and len(spec.dims) == 2]
        if len(found) != 1:
            raise PatternNotMatched(
                "expected one input of token ids (batch, seq)" + (f", found {len(found)}" if found else ""),
                ", ".join(spec.name for spec in found) or "the inputs",
            )
        return found[0]

    # Layers

    def _recognize_layer(self, node: ir.Node) -> AttentionLayer:
        where = node.name or "Attention"
        if int_attribute(node, "qk_matmul_output_mode", 0) and len(node.outputs) > 3:
            raise PatternNotMatched("its scores are an output, so that no key may go", where)
        if "softcap" in node.attributes and node.attributes["softcap"].as_float():
            raise PatternNotMatched("its scores are soft-capped", where)
        query, key, value = (node.inputs[at] for at in range(3))
        dims = self.sizes.dims(query) if query is not None else None
        if query is None or key is None or value is None or dims is None or len(dims) != 4 or not isinstance(dims[1], int):
            raise PatternNotMatched("expected queries (batch, heads, seq, size)", where)
        keys, values = self._recognize_kv_tensor(key, where), self._recognize_kv_tensor(value, where)
        heads = self._kv_head_count(keys.cache, where)
        return AttentionLayer(
            attention=node,
            key=keys,
            value=values,
            heads=dims[1],
            kv_heads=heads,
            visibility=self._recognize_visibility(node, keys, where),
        )

    def _kv_head_count(self, cache: ir.Value, location: str) -> int:
        dims = self.sizes.dims(cache)
        if dims is None or len(dims) != 4 or not isinstance(dims[1], int):
            raise PatternNotMatched(f"expected keys (batch, kv_heads, rows, size), `{cache.name}` is {dims}", location)
        return dims[1]

    def _recognize_kv_tensor(self, attended: ir.Value, location: str) -> KVTensor:
        whole = attended
        for _ in range(8):
            whole = self._skip_pass_through(whole)
            before = self.matcher.before_repeat_kv(whole)
            if before is None:
                break
            whole = before
        dims = self.sizes.dims(whole)
        if dims is None or len(dims) != 4 or not isinstance(dims[3], int):
            raise PatternNotMatched(f"expected (batch, kv_heads, rows, size), `{whole.name}` is {dims}", location)
        dtype = self.model_info.types[whole]
        node = whole.producer()
        if node is not None and node.op_type == "Concat" and len(node.inputs) == 2:
            past, new = node.inputs
            state = self.states.get(past.name or "") if past is not None else None
            if state is not None and new is not None and state.append_axis == int_attribute(node, "axis", 0) % 4 == 2:
                return KVTensor(state=state, update=new, cache=whole, head_size=dims[3], dtype=dtype)
        if self.states:
            raise PatternNotMatched(
                "expected a cache and what is new, joined along the rows (Concat)",
                location if node is None else node.name or location,
            )
        return KVTensor(state=None, update=whole, cache=whole, head_size=dims[3], dtype=dtype)

    def _skip_pass_through(self, value: ir.Value) -> ir.Value:
        node = value.producer()
        while node is not None and node.op_type in _PASS_THROUGH_OPS and node.inputs[0] is not None:
            value = node.inputs[0]
            node = value.producer()
        return value

    # Masks

    def _recognize_visibility(self, node: ir.Node, key: KVTensor, location: str) -> Visibility:
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        causal = bool(int_attribute(node, "is_causal", 0))
        if mask is None:
            if causal and key.state is None:
                return Visibility(window=None, padding=False)
            raise PatternNotMatched(
                "every query sees every key: that is no decoder"
                if not causal
                else "it is causal from the upper left, with a past",
                location,
            )
        if causal:
            raise PatternNotMatched("it is causal and has a mask", location)
        if mask not in self._visibility_by_mask:
            self._visibility_by_mask[mask] = self._probe_visibility(mask, location)
        return self._visibility_by_mask[mask]

    def _probe_visibility(self, mask: ir.Value, location: str) -> Visibility:
        if mask not in self.position_subgraph.step_dependent:
            raise PatternNotMatched(f"its mask `{mask.name}` depends on more than sizes, masks and positions", location)
        try:
            padding = self.mask is not None and not self._ignores_padding(mask)
            slopes = self._probe_alibi_slopes(mask)
            window = self._probe_window(mask, location, slopes)
            for batch, seq, past in self._probe_sizes():
                for holes in (0, 2) if padding else (0,):
                    given = self._evaluate_mask_if_defined(mask, batch, seq, past, holes)
                    if given is not None:
                        self._check_causal(given, location, (batch, seq, past), holes, window, slopes)
        except ProbeError as unknown:
            raise PatternNotMatched(f"what its mask hides cannot be told: {unknown}", location) from None
        return Visibility(window=window, padding=padding, alibi_slopes=slopes)

    def _probe_sizes(self) -> Iterator[tuple[int, int, int]]:
        for batch, seq, past in _PROBE_SIZES:
            yield batch, seq, past if self.states else 0

    def _visible_keys(self, mask: ir.Value, batch: int, seq: int, past: int, padding_tokens: int = 0) -> Array:
        """Return (batch, heads or 1, seq, past+seq) bool: what `mask` lets be seen, `holes` tokens of row 0 being padding."""
        return _to_bool_mask(self._evaluate_mask(mask, batch, seq, past, padding_tokens))

    def _evaluate_mask(self, mask: ir.Value, batch: int, seq: int, past: int, padding_tokens: int = 0) -> Array:
        """Return what `mask` is in that step, (batch, heads or 1, seq, past+seq)."""
        found = self.position_subgraph.run(mask, *self.probe_inputs(batch, seq, past, padding_tokens))
        return np.broadcast_to(found, np.broadcast_shapes(found.shape, (batch, 1, seq, past + seq)))

    def _evaluate_mask_if_defined(self, mask: ir.Value, batch: int, seq: int, past: int, padding_tokens: int) -> Array | None:
        """Return the same; None for several tokens behind a past, where some masks are not defined and none is needed."""
        try:
            return self._evaluate_mask(mask, batch, seq, past, padding_tokens)
        except ProbeSizeError:
            if seq == 1 or past == 0:
                raise
            return None

    def _probe_alibi_slopes(self, mask: ir.Value) -> tuple[float, ...]:
        """Return how steeply the biases of the heads rise with the position of a key; nothing where there are none."""
        last = self._evaluate_mask(mask, 1, 2, 0)[0, :, -1]
        rises = last[:, 1] - last[:, 0] if last.dtype != np.bool_ else np.zeros(1)
        return tuple(map(float, rises)) if rises.any() else ()

    def probe_inputs(
        self, batch: int, seq: int, past: int, padding_tokens: int = 0
    ) -> tuple[dict[str, int], dict[ir.Value, Array]]:
        """Return the sizes of the named dims and the inputs of the clockwork for one step."""
        sizes: dict[str, int] = {}
        values: dict[ir.Value, Array] = {}
        for value, spec in zip(
            (one for one in self.model.graph.inputs if not one.is_initializer()), self.interface.inputs, strict=True
        ):
            numbers: tuple[int, ...] = ()
            if spec.role == "state" and spec.name in self.states and spec.dims is not None:
                numbers = tuple(
                    batch if axis == 0 else past if axis == self.states[spec.name].append_axis else -1
                    for axis in range(len(spec.dims))
                )
            elif spec.role == "ids":
                numbers = (batch, seq)
            elif spec.role == "mask":
                numbers = (batch, past + seq)
                array = np.ones(numbers, spec.dtype)
                array[0, :padding_tokens] = 0
                values[value] = array
            elif spec.role == "positions":
                numbers = (batch, seq)
                array = np.broadcast_to(past + np.arange(seq), numbers).astype(spec.dtype)
                if padding_tokens:
                    array = array.copy()
                    array[0] = np.maximum(array[0] - padding_tokens, 0)
                values[value] = array
            for dim, number in zip(spec.dims or (), numbers, strict=False):
                if isinstance(dim, str) and number >= 0:
                    sizes.setdefault(dim, number)
        return sizes, values

    def _ignores_padding(self, mask: ir.Value) -> bool:
        batch, seq, past = _PROBE_SIZES[-1]
        return bool(np.array_equal(self._visible_keys(mask, batch, seq, past), self._visible_keys(mask, batch, seq, past, 2)))

    def _probe_window(self, mask: ir.Value, location: str, slopes: tuple[float, ...]) -> int | None:
        """Return how many keys a query sees that has many before it, or None where it sees all."""
        # What is looked at has as many elements with an axis of heads as without.
        heads = self._evaluate_mask(mask, 1, 1, 0).shape[1]
        far = _MAX_PROBE_LENGTH // heads if self.states else int(_MAX_SQUARE_PROBE_LENGTH / heads**0.5)
        if slopes:
            far = min(far, int(-MASK_FILL_THRESHOLD / 2 / max(map(abs, slopes))))
        while True:
            past, seq = (far - 1, 1) if self.states else (0, far)
            try:
                last = self._evaluate_mask(mask, 1, seq, past)[:, :, -1:]
                break
            except ProbeError:
                if far < 64:
                    raise
                far //= 2
        self.probed_length = min(self.probed_length, far)
        visible = _to_bool_mask(last)
        seen = {int(one) for one in visible.sum(axis=3).flat}
        count = seen.pop()
        if seen or not visible[..., far - count :].all():
            raise PatternNotMatched("its heads see different keys, or keys with gaps between them", location)
        self._check_alibi_biases(last, visible, slopes, location)
        return None if count == far else count

    def _check_causal(
        self,
        mask_values: Array,
        location: str,
        probe_size: tuple[int, int, int],
        padding_tokens: int,
        window: int | None,
        slopes: tuple[float, ...],
    ) -> None:
        """Refuse what is `given` (batch, heads or 1, seq, past+seq) for a step unless it is causal, over any `window`."""
        batch, seq, past = probe_size
        visible = _to_bool_mask(mask_values)
        at, query = np.arange(past + seq), past + np.arange(seq)[:, None]
        expected = np.broadcast_to(
            (at <= query) & (at > query - (window or past + seq + 1)), (batch, 1, seq, past + seq)
        ).copy()
        expected[0, :, :, :padding_tokens] = False
        real = np.ones((batch, seq), bool)
        real[0] = query[:, 0] >= padding_tokens
        if np.any((visible != expected) & real[:, None, :, None]):
            raise PatternNotMatched(
                f"expected a causal mask{f' over {window} tokens' if window else ''}, and it is another "
                f"(for {seq} queries after {past} tokens{f', {padding_tokens} of them padding' if padding_tokens else ''})",
                location,
            )
        self._check_alibi_biases(mask_values, visible & real[:, None, :, None], slopes, location)

    def _check_alibi_biases(self, mask_values: Array, visible: Array, slopes: tuple[float, ...], location: str) -> None:
        """Refuse biases that, where they count, are not `slopes` times how far behind its query a key stands."""
        if mask_values.dtype == np.bool_:
            return
        bent = "scores are biased by what is no slope over the positions of the keys"
        biases = np.where(visible, mask_values, 0)
        if not np.isfinite(biases).all() or not np.isfinite(slopes).all():
            raise PatternNotMatched(bent, location)
        at = np.arange(mask_values.shape[3])
        last = np.where(visible, at, 0).max(axis=3, keepdims=True)
        expected = np.take_along_axis(biases, last, axis=3) - np.array(slopes or (0,))[:, None, None] * (last - at)
        scale = np.maximum(np.abs(biases).max(axis=3, keepdims=True), 1).astype(np.float64)
        off = max(1e-5, 4 * float(ml_dtypes.finfo(mask_values.dtype).eps)) * scale  # type: ignore[no-untyped-call]
        if np.any(np.where(visible, np.abs(biases - expected), 0) > off):
            raise PatternNotMatched(bent, location)

    # Positions

    def _find_position_inputs(self, layers: list[AttentionLayer]) -> tuple[list[PositionTensor], PositionEncoding, int | None]:
        """Return the tensors that say where tokens stand, how they enter, and how many positions there are."""
        masks = {layer.attention.inputs[3] for layer in layers if len(layer.attention.inputs) > 3}
        dead = self._dead_repeat_sizes(layers)
        found: dict[ir.Value, PositionTensor] = {}
        style: PositionEncoding = "alibi" if any(layer.visibility.alibi_slopes for layer in layers) else "none"
        longest = None
        for border in self.position_subgraph.boundary_values():
            if border in masks or border in dead:
                continue
            value = self._find_position_tensor(border)
            found[value] = PositionTensor(
                value,
                self.position_subgraph.run(value, *self.probe_inputs(1, 3, 5 if self.states else 0)).ndim,
                self._seq_axis(value),
            )
            table = self._position_table_length(border)
            if table is not None:
                style, longest = "learned" if style != "alibi" else style, table
            elif style == "none":
                style = "rope"
        return list(found.values()), style, longest

    def _dead_repeat_sizes(self, layers: list[AttentionLayer]) -> set[ir.Value]:
        """Return the sizes that only what stands between a cache and its attention reads: it goes."""
        going: set[ir.Node] = set()
        for layer in layers:
            for at, side in ((1, layer.key), (2, layer.value)):
                value = layer.attention.inputs[at]
                while value is not None and value is not side.cache and (node := value.producer()) is not None:
                    going.add(node)
                    value = node.inputs[0]
        return {
            value
            for value in self.position_subgraph.boundary_values()
            if all(
                node in going
                for node in value.consumers()
                if any(output not in self.position_subgraph.step_dependent for output in node.outputs)
            )
        }

    def _position_table_length(self, boundary: ir.Value) -> int | None:
        """Return the number of rows where `border` is looked up in a table of positions."""
        node = boundary.producer()
        if node is None or node.op_type != "Gather":
            return None
        table = constant_tensor(node.inputs[0])
        return int(table.numpy().shape[0]) if table is not None and len(table.shape) == 2 else None

    def _find_position_tensor(self, boundary: ir.Value) -> ir.Value:
        """Return the last tensor of positions (batch or 1, seq) before `border`."""
        waiting, seen = [boundary], {boundary}
        tried: list[str] = []
        while waiting:
            value = waiting.pop(0)
            if self.model_info.types.get(value) in _INTEGER_TYPES:
                if self._holds_positions(value) and self._is_row_independent(value, boundary):
                    return value
                tried.append(value.name or "")
            node = value.producer()
            for one in node.inputs if node is not None else ():
                if one is not None and self.position_subgraph.step_dependent.get(one) and one not in seen:
                    seen.add(one)
                    waiting.append(one)
        raise PatternNotMatched(
            f"`{boundary.name}` changes from step to step, and not with the positions of the tokens",
            (boundary.producer() or boundary).name or "",
        )

    def _holds_positions(self, value: ir.Value) -> bool:
        """Whether `value` holds where the tokens of the step stand, along one axis; the first may be the batch's."""
        try:
            for batch, seq, past in self._probe_sizes():
                found = self.position_subgraph.run(value, *self.probe_inputs(batch, seq, past))
                shape = [1] * found.ndim
                shape[self._seq_axis(value)] = seq
                wanted = np.reshape(past + np.arange(seq), shape)
                if found.shape[1:] != wanted.shape[1:] or found.shape[:1] not in ((1,), (batch,)) and found.ndim > 1:
                    return False
                if not (found == wanted).all():
                    return False
        except ProbeError:
            return False
        return True

    def _seq_axis(self, value: ir.Value) -> int:
        """Return the axis of `value` along which the tokens of a step lie; raises Unknown."""
        shape = self.position_subgraph.run(value, *self.probe_inputs(1, 3, 5 if self.states else 0)).shape
        if sorted(shape)[-1:] != [3] or np.prod(shape) != 3:
            raise ProbeError(f"`{value.name}` has no axis of tokens")
        return int(shape.index(3))

    def _is_row_independent(self, value: ir.Value, boundary: ir.Value) -> bool:
        """Whether what `border` is for a row of positions does not depend on the other rows, along its first axis."""
        batch, seq, past = 3, 4, 9 if self.states else 0
        sizes, given = self.probe_inputs(batch, seq, past)
        try:
            rank, axis = self.position_subgraph.run(value, sizes, given).ndim, self._seq_axis(value)
            if rank < 2 and self._position_table_length(boundary) is None:
                return False
            shape = [batch, *(1,) * max(rank - 1, 1)]
            shape[max(axis, 1)] = seq
            rows = np.random.default_rng(0).integers(0, past + seq, shape).astype(self.model_info.types[value].numpy())
            whole = self.position_subgraph.run(boundary, sizes, {**given, value: rows})
            single = [
                self.position_subgraph.run(boundary, self.probe_inputs(1, seq, past)[0], {**given, value: rows[at : at + 1]})
                for at in range(batch)
            ]
        except ProbeError:
            return False
        return whole.shape[:1] == (batch,) and np.array_equal(whole, np.concatenate(single))


def _to_bool_mask(mask: Array) -> Array:
    """Return which scores count under what `mask` is: a condition, or numbers that are added."""
    return mask if mask.dtype == np.bool_ else mask > MASK_FILL_THRESHOLD
