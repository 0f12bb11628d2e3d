"""Recognising a decoder: attention by structure, its mask and its positions by running them on small numbers."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.analysis.sizes import attribute, constant
from ryzen_compile.ir.edit.builder import Known
from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.spec.interface import InputSpec, Interface
from ryzen_compile.spec.kv_cache import Positions
from ryzen_compile.spec.passes import Change, Context
from ryzen_passes.attention.fuse import raise_all
from ryzen_passes.attention.match import MASKED_BELOW, Matcher
from ryzen_passes.fold import Fold
from ryzen_passes.kv.recognition.decoder import Clock, Decoder, Layer, Side, Sight, Unrecognised
from ryzen_passes.kv.recognition.position_subgraph import Array, Clockwork, Undefined, Unknown
from ryzen_passes.kv.recognition.shapes import settle_shapes
from ryzen_passes.legalize_msft import Foreign, standardise

_OPSET = 24
_FARTHEST_LOOK, _FARTHEST_SQUARE = 1 << 20, 1 << 12
"""A window is told from none by a query that has this many tokens before it; the second where masks are square."""
_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)
_CARRIES = frozenset({"Identity", "Cast"})
_PROBES = ((2, 3, 5), (1, 1, 7), (2, 4, 0))
"""(batch, seq, past) at which masks and positions are looked at."""


def recognise(model: ir.Model) -> Decoder:
    """Return the decoder that `model` is, folded and its attention raised to ONNX Attention in place. Raises Unrecognised."""
    try:
        standardise(model)
    except Foreign as foreign:
        raise Unrecognised(str(foreign), foreign.where) from None
    interface = interface_of(model)
    Fold().rewrite(model, Context(backend="onnxruntime"))
    settle_shapes(model, interface)
    known = Known(model)
    change = raise_all(known, _OPSET)
    attentions = [node for node in model.graph if node.op_type == "Attention" and node.domain == ""]
    if not attentions:
        raise _without_attention(model, change)
    for node in attentions:
        node.name = node.name or known.names.new("attention")
    return _Reader(model, interface, known).read(attentions)


def _without_attention(model: ir.Model, change: Change) -> Unrecognised:
    """Return why no attention was found."""
    for node in model.graph:
        if node.op_type.endswith("Attention"):
            says = f"its attention is the operator {node.op_type} of the domain `{node.domain}`"
            return Unrecognised(
                says, node.name or node.op_type, hint="export it with ops of ONNX's own: torch.onnx, or Optimum"
            )
    softmax = next((node for node in model.graph if node.op_type == "Softmax"), None)
    where = (softmax.name if softmax is not None else model.graph.name) or "the graph"
    return Unrecognised(f"no attention was found: {change.notes[0] if change.notes else change.says}", where)


class _Reader:
    def __init__(self, model: ir.Model, interface: Interface, known: Known) -> None:
        self.model, self.interface, self.known = model, interface, known
        self.sizes = known.sizes
        self.matcher = Matcher(known.sizes)
        self.states = {state.input: state for state in interface.states if state.grows is not None}
        self.clockwork = Clockwork(model, interface, known.sizes)
        self.ids = self._ids()
        self.mask = next((spec for spec in interface.inputs if spec.role == "mask"), None)
        self._sights: dict[ir.Value, Sight] = {}
        self.looked = _FARTHEST_LOOK

    def read(self, attentions: list[ir.Node]) -> Decoder:
        layers = [self._layer(node) for node in attentions]
        used = {side.state.input for layer in layers for side in (layer.key, layer.value) if side.state is not None}
        if lost := [name for name in self.states if name not in used]:
            raise Unrecognised("the cache is not read by any attention that was found", lost[0])
        clocks, style, longest = self._clocks(layers)
        return Decoder(
            model=self.model,
            interface=self.interface,
            clockwork=self.clockwork,
            layers=layers,
            ids=self.ids,
            mask=self.mask,
            clocks=clocks,
            style=style,
            longest=longest,
            looked=self.looked,
        )

    def _ids(self) -> InputSpec:
        found = [spec for spec in self.interface.inputs if spec.role == "ids" and spec.dims and len(spec.dims) == 2]
        if len(found) != 1:
            raise Unrecognised(
                "expected one input of token ids (batch, seq)" + (f", found {len(found)}" if found else ""),
                ", ".join(spec.name for spec in found) or "the inputs",
            )
        return found[0]

    # Layers

    def _layer(self, node: ir.Node) -> Layer:
        where = node.name or "Attention"
        if attribute(node, "qk_matmul_output_mode", 0) and len(node.outputs) > 3:
            raise Unrecognised("its scores are an output, so that no key may go", where)
        if "softcap" in node.attributes and node.attributes["softcap"].as_float():
            raise Unrecognised("its scores are soft-capped", where)
        query, key, value = (node.inputs[at] for at in range(3))
        dims = self.sizes.dims(query) if query is not None else None
        if query is None or key is None or value is None or dims is None or len(dims) != 4 or not isinstance(dims[1], int):
            raise Unrecognised("expected queries (batch, heads, seq, size)", where)
        keys, values = self._side(key, where), self._side(value, where)
        heads = self._heads(keys.whole, where)
        return Layer(
            attention=node, key=keys, value=values, heads=dims[1], kv_heads=heads, sight=self._sight(node, keys, where)
        )

    def _heads(self, whole: ir.Value, where: str) -> int:
        dims = self.sizes.dims(whole)
        if dims is None or len(dims) != 4 or not isinstance(dims[1], int):
            raise Unrecognised(f"expected keys (batch, kv_heads, rows, size), `{whole.name}` is {dims}", where)
        return dims[1]

    def _side(self, read: ir.Value, where: str) -> Side:
        whole = read
        for _ in range(8):
            whole = self._before_carriers(whole)
            before = self.matcher.before_repeat(whole)
            if before is None:
                break
            whole = before
        dims = self.sizes.dims(whole)
        if dims is None or len(dims) != 4 or not isinstance(dims[3], int):
            raise Unrecognised(f"expected (batch, kv_heads, rows, size), `{whole.name}` is {dims}", where)
        dtype = self.known.types[whole]
        node = whole.producer()
        if node is not None and node.op_type == "Concat" and len(node.inputs) == 2:
            past, new = node.inputs
            state = self.states.get(past.name or "") if past is not None else None
            if state is not None and new is not None and state.grows == attribute(node, "axis", 0) % 4 == 2:
                return Side(state=state, new=new, whole=whole, size=dims[3], dtype=dtype)
        if self.states:
            raise Unrecognised(
                "expected a cache and what is new, joined along the rows (Concat)",
                where if node is None else node.name or where,
            )
        return Side(state=None, new=whole, whole=whole, size=dims[3], dtype=dtype)

    def _before_carriers(self, value: ir.Value) -> ir.Value:
        node = value.producer()
        while node is not None and node.op_type in _CARRIES and node.inputs[0] is not None:
            value = node.inputs[0]
            node = value.producer()
        return value

    # Masks

    def _sight(self, node: ir.Node, keys: Side, where: str) -> Sight:
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        causal = bool(attribute(node, "is_causal", 0))
        if mask is None:
            if causal and keys.state is None:
                return Sight(window=None, padding=False)
            raise Unrecognised(
                "every query sees every key: that is no decoder"
                if not causal
                else "it is causal from the upper left, with a past",
                where,
            )
        if causal:
            raise Unrecognised("it is causal and has a mask", where)
        if mask not in self._sights:
            self._sights[mask] = self._seen_through(mask, where)
        return self._sights[mask]

    def _seen_through(self, mask: ir.Value, where: str) -> Sight:
        if mask not in self.clockwork.timed:
            raise Unrecognised(f"its mask `{mask.name}` depends on more than sizes, masks and positions", where)
        try:
            padding = self.mask is not None and not self._is_blind(mask)
            slopes = self._slopes(mask)
            window = self._window(mask, where, slopes)
            for batch, seq, past in self._probes():
                for holes in (0, 2) if padding else (0,):
                    given = self._given_where_defined(mask, batch, seq, past, holes)
                    if given is not None:
                        self._check(given, where, (batch, seq, past), holes, window, slopes)
        except Unknown as unknown:
            raise Unrecognised(f"what its mask hides cannot be told: {unknown}", where) from None
        return Sight(window=window, padding=padding, slopes=slopes)

    def _probes(self) -> Iterator[tuple[int, int, int]]:
        for batch, seq, past in _PROBES:
            yield batch, seq, past if self.states else 0

    def _visible(self, mask: ir.Value, batch: int, seq: int, past: int, holes: int = 0) -> Array:
        """Return (batch, heads or 1, seq, past+seq) bool: what `mask` lets be seen, `holes` tokens of row 0 being padding."""
        return _counts(self._given_by(mask, batch, seq, past, holes))

    def _given_by(self, mask: ir.Value, batch: int, seq: int, past: int, holes: int = 0) -> Array:
        """Return what `mask` is in that step, (batch, heads or 1, seq, past+seq)."""
        found = self.clockwork.run(mask, *self.given(batch, seq, past, holes))
        return np.broadcast_to(found, np.broadcast_shapes(found.shape, (batch, 1, seq, past + seq)))

    def _given_where_defined(self, mask: ir.Value, batch: int, seq: int, past: int, holes: int) -> Array | None:
        """Return the same; None for several tokens behind a past, where some masks are not defined and none is needed."""
        try:
            return self._given_by(mask, batch, seq, past, holes)
        except Undefined:
            if seq == 1 or past == 0:
                raise
            return None

    def _slopes(self, mask: ir.Value) -> tuple[float, ...]:
        """Return how steeply the biases of the heads rise with the position of a key; nothing where there are none."""
        last = self._given_by(mask, 1, 2, 0)[0, :, -1]
        rises = last[:, 1] - last[:, 0] if last.dtype != np.bool_ else np.zeros(1)
        return tuple(map(float, rises)) if rises.any() else ()

    def given(self, batch: int, seq: int, past: int, holes: int = 0) -> tuple[dict[str, int], dict[ir.Value, Array]]:
        """Return the sizes of the named dims and the inputs of the clockwork for one step."""
        sizes: dict[str, int] = {}
        values: dict[ir.Value, Array] = {}
        for value, spec in zip(
            (one for one in self.model.graph.inputs if not one.is_initializer()), self.interface.inputs, strict=True
        ):
            numbers: tuple[int, ...] = ()
            if spec.role == "state" and spec.name in self.states and spec.dims is not None:
                numbers = tuple(
                    batch if axis == 0 else past if axis == self.states[spec.name].grows else -1
                    for axis in range(len(spec.dims))
                )
            elif spec.role == "ids":
                numbers = (batch, seq)
            elif spec.role == "mask":
                numbers = (batch, past + seq)
                array = np.ones(numbers, spec.dtype)
                array[0, :holes] = 0
                values[value] = array
            elif spec.role == "positions":
                numbers = (batch, seq)
                array = np.broadcast_to(past + np.arange(seq), numbers).astype(spec.dtype)
                if holes:
                    array = array.copy()
                    array[0] = np.maximum(array[0] - holes, 0)
                values[value] = array
            for dim, number in zip(spec.dims or (), numbers, strict=False):
                if isinstance(dim, str) and number >= 0:
                    sizes.setdefault(dim, number)
        return sizes, values

    def _is_blind(self, mask: ir.Value) -> bool:
        batch, seq, past = _PROBES[-1]
        return bool(np.array_equal(self._visible(mask, batch, seq, past), self._visible(mask, batch, seq, past, 2)))

    def _window(self, mask: ir.Value, where: str, slopes: tuple[float, ...]) -> int | None:
        """Return how many keys a query sees that has many before it, or None where it sees all."""
        # What is looked at has as many elements with an axis of heads as without.
        heads = self._given_by(mask, 1, 1, 0).shape[1]
        far = _FARTHEST_LOOK // heads if self.states else int(_FARTHEST_SQUARE / heads**0.5)
        if slopes:
            far = min(far, int(-MASKED_BELOW / 2 / max(map(abs, slopes))))
        while True:
            past, seq = (far - 1, 1) if self.states else (0, far)
            try:
                last = self._given_by(mask, 1, seq, past)[:, :, -1:]
                break
            except Unknown:
                if far < 64:
                    raise
                far //= 2
        self.looked = min(self.looked, far)
        visible = _counts(last)
        seen = {int(one) for one in visible.sum(axis=3).flat}
        count = seen.pop()
        if seen or not visible[..., far - count :].all():
            raise Unrecognised("its heads see different keys, or keys with gaps between them", where)
        self._check_biases(last, visible, slopes, where)
        return None if count == far else count

    def _check(
        self,
        given: Array,
        where: str,
        step: tuple[int, int, int],
        holes: int,
        window: int | None,
        slopes: tuple[float, ...],
    ) -> None:
        """Refuse what is `given` (batch, heads or 1, seq, past+seq) for a step unless it is causal, over any `window`."""
        batch, seq, past = step
        visible = _counts(given)
        at, query = np.arange(past + seq), past + np.arange(seq)[:, None]
        expected = np.broadcast_to(
            (at <= query) & (at > query - (window or past + seq + 1)), (batch, 1, seq, past + seq)
        ).copy()
        expected[0, :, :, :holes] = False
        real = np.ones((batch, seq), bool)
        real[0] = query[:, 0] >= holes
        if np.any((visible != expected) & real[:, None, :, None]):
            raise Unrecognised(
                f"expected a causal mask{f' over {window} tokens' if window else ''}, and it is another "
                f"(for {seq} queries after {past} tokens{f', {holes} of them padding' if holes else ''})",
                where,
            )
        self._check_biases(given, visible & real[:, None, :, None], slopes, where)

    def _check_biases(self, given: Array, counts: Array, slopes: tuple[float, ...], where: str) -> None:
        """Refuse biases that, where they count, are not `slopes` times how far behind its query a key stands."""
        if given.dtype == np.bool_:
            return
        bent = "scores are biased by what is no slope over the positions of the keys"
        biases = np.where(counts, given, 0)
        if not np.isfinite(biases).all() or not np.isfinite(slopes).all():
            raise Unrecognised(bent, where)
        at = np.arange(given.shape[3])
        last = np.where(counts, at, 0).max(axis=3, keepdims=True)
        expected = np.take_along_axis(biases, last, axis=3) - np.array(slopes or (0,))[:, None, None] * (last - at)
        scale = np.maximum(np.abs(biases).max(axis=3, keepdims=True), 1).astype(np.float64)
        off = max(1e-5, 4 * float(ml_dtypes.finfo(given.dtype).eps)) * scale  # type: ignore[no-untyped-call]
        if np.any(np.where(counts, np.abs(biases - expected), 0) > off):
            raise Unrecognised(bent, where)

    # Positions

    def _clocks(self, layers: list[Layer]) -> tuple[list[Clock], Positions, int | None]:
        """Return the tensors that say where tokens stand, how they enter, and how many positions there are."""
        masks = {layer.attention.inputs[3] for layer in layers if len(layer.attention.inputs) > 3}
        dead = self._sizes_of_repeats(layers)
        found: dict[ir.Value, Clock] = {}
        style: Positions = "alibi" if any(layer.sight.slopes for layer in layers) else "none"
        longest = None
        for border in self.clockwork.borders():
            if border in masks or border in dead:
                continue
            value = self._clock_behind(border)
            found[value] = Clock(
                value, self.clockwork.run(value, *self.given(1, 3, 5 if self.states else 0)).ndim, self._seq_axis(value)
            )
            table = self._table(border)
            if table is not None:
                style, longest = "learned" if style != "alibi" else style, table
            elif style == "none":
                style = "rope"
        return list(found.values()), style, longest

    def _sizes_of_repeats(self, layers: list[Layer]) -> set[ir.Value]:
        """Return the sizes that only what stands between a cache and its attention reads: it goes."""
        going: set[ir.Node] = set()
        for layer in layers:
            for at, side in ((1, layer.key), (2, layer.value)):
                value = layer.attention.inputs[at]
                while value is not None and value is not side.whole and (node := value.producer()) is not None:
                    going.add(node)
                    value = node.inputs[0]
        return {
            value
            for value in self.clockwork.borders()
            if all(
                node in going
                for node in value.consumers()
                if any(output not in self.clockwork.timed for output in node.outputs)
            )
        }

    def _table(self, border: ir.Value) -> int | None:
        """Return the number of rows where `border` is looked up in a table of positions."""
        node = border.producer()
        if node is None or node.op_type != "Gather":
            return None
        table = constant(node.inputs[0])
        return int(table.numpy().shape[0]) if table is not None and len(table.shape) == 2 else None

    def _clock_behind(self, border: ir.Value) -> ir.Value:
        """Return the last tensor of positions (batch or 1, seq) before `border`."""
        waiting, seen = [border], {border}
        tried: list[str] = []
        while waiting:
            value = waiting.pop(0)
            if self.known.types.get(value) in _INTEGERS:
                if self._tells_positions(value) and self._keeps_rows_apart(value, border):
                    return value
                tried.append(value.name or "")
            node = value.producer()
            for one in node.inputs if node is not None else ():
                if one is not None and self.clockwork.timed.get(one) and one not in seen:
                    seen.add(one)
                    waiting.append(one)
        raise Unrecognised(
            f"`{border.name}` changes from step to step, and not with the positions of the tokens",
            (border.producer() or border).name or "",
        )

    def _tells_positions(self, value: ir.Value) -> bool:
        """Whether `value` holds where the tokens of the step stand, along one axis; the first may be the batch's."""
        try:
            for batch, seq, past in self._probes():
                found = self.clockwork.run(value, *self.given(batch, seq, past))
                shape = [1] * found.ndim
                shape[self._seq_axis(value)] = seq
                wanted = np.reshape(past + np.arange(seq), shape)
                if found.shape[1:] != wanted.shape[1:] or found.shape[:1] not in ((1,), (batch,)) and found.ndim > 1:
                    return False
                if not (found == wanted).all():
                    return False
        except Unknown:
            return False
        return True

    def _seq_axis(self, value: ir.Value) -> int:
        """Return the axis of `value` along which the tokens of a step lie; raises Unknown."""
        shape = self.clockwork.run(value, *self.given(1, 3, 5 if self.states else 0)).shape
        if sorted(shape)[-1:] != [3] or np.prod(shape) != 3:
            raise Unknown(f"`{value.name}` has no axis of tokens")
        return int(shape.index(3))

    def _keeps_rows_apart(self, value: ir.Value, border: ir.Value) -> bool:
        """Whether what `border` is for a row of positions does not depend on the other rows, along its first axis."""
        batch, seq, past = 3, 4, 9 if self.states else 0
        sizes, given = self.given(batch, seq, past)
        try:
            rank, axis = self.clockwork.run(value, sizes, given).ndim, self._seq_axis(value)
            if rank < 2 and self._table(border) is None:
                return False
            shape = [batch, *(1,) * max(rank - 1, 1)]
            shape[max(axis, 1)] = seq
            rows = np.random.default_rng(0).integers(0, past + seq, shape).astype(self.known.types[value].numpy())
            whole = self.clockwork.run(border, sizes, {**given, value: rows})
            single = [
                self.clockwork.run(border, self.given(1, seq, past)[0], {**given, value: rows[at : at + 1]})
                for at in range(batch)
            ]
        except Unknown:
            return False
        return whole.shape[:1] == (batch,) and np.array_equal(whole, np.concatenate(single))


def _counts(mask: Array) -> Array:
    """Return which scores count under what `mask` is: a condition, or numbers that are added."""
    return mask if mask.dtype == np.bool_ else mask > MASKED_BELOW
