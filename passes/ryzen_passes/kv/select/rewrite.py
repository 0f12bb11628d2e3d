"""Selecting: caches that keep every token, and attention that reads a few pages of them, chosen anew by each query.

A page is a run of slots. What its keys are is summed up by a row or two: their smallest and largest elements, or the sum of
their directions. A step of one token brings its own page up to date, lets PageScoreBound or PageScoreCosine score the pages by
its queries, gathers the best ones and attends over these. The query heads that share a kv-head share its pages, and become the
rows of one attention. A step of several tokens reads everything, and brings the pages up to date that it wrote into.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.edit.builder import Known, Writer
from ryzen_compile.spec.kv_cache import CachedLayer
from ryzen_compile.spec.kv_cache import attach as attach_map
from ryzen_compile.spec.op import Op
from ryzen_compile.spec.passes import Change
from ryzen_passes.kv.states import States
from ryzen_passes.kv.static.cache_view import FixedForm, FixedLayer
from ryzen_passes.kv.static.positions import LENGTH, STEM
from ryzen_passes.opset import standard_opset
from ryzen_plugins.page_score import PAGE_SCORE_BOUND, PAGE_SCORE_COSINE

SCORES: dict[str, tuple[Op, tuple[str, ...]]] = {
    "bound": (PAGE_SCORE_BOUND, ("low", "high")),
    "cosine": (PAGE_SCORE_COSINE, ("direction",)),
}
"""How pages are scored: the op, and what is kept of each page for it."""

METHOD = "select"
"""What the map of the caches calls it."""

_BOOL, _INT32, _INT64, _FLOAT = ir.DataType.BOOL, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.FLOAT


def select(form: FixedForm, known: Known, *, score: str, page: int, keep: int) -> Change:
    """Rewrite `form` in place so that a step of one token reads `keep` pages of `page` tokens a head."""
    return _Selecter(form, known, score, page, keep).run()


class _Selecter:
    def __init__(self, form: FixedForm, known: Known, score: str, page: int, keep: int) -> None:
        self.form, self.known = form, known
        self.graph = form.model.graph
        self.write = Writer(self.graph, known)
        self.score = score
        self.op_of_pages, self.words = SCORES[score]
        self.page, self.keep = page, keep
        self.states = States(self.write, form.interface)
        self.layers: list[CachedLayer] = []
        self._shared: dict[object, ir.Value] = {}

    def run(self) -> Change:
        form = self.form
        self.first = form.behind_positions()
        one = form.seq == 1
        (self._tell_page if one else self._tell_pages)()
        for at, layer in enumerate(form.layers):
            pages = (layer.told.slots or 0) // self.page
            dtype = self.known.types[layer.key.new]
            shape = ir.Shape((form.batch, layer.told.kv_heads, pages, layer.key.told.size))
            pasts = [self.states.begin(f"{word}.{at}", dtype, shape) for word in self.words]
            outs = self._renewed(layer, pasts) if one else self._read_again(layer, pasts, pages)
            for word, value in zip(self.words, outs, strict=True):
                self.states.end(f"{word}.{at}", value, in_place=one)
            if one:
                self._attend(layer, outs, pages)
            told = msgspec.structs.replace(layer.told, method=METHOD, page=self.page, keep=self.keep, picks=self.score)
            self.layers.append(told)
        if one:
            self.op_of_pages.add_to(form.model)
            function = form.model.functions[self.op_of_pages.function().identifier()]
            function.opset_imports[""] = standard_opset(form.model)
        self.states.attach(form.model, form.interface)
        attach_map(form.model, msgspec.structs.replace(form.told, layers=tuple(self.layers)))
        reads = (
            f"a token reads {self.keep} pages of {self.page} tokens a head" if one else "pages are told for steps of one token"
        )
        return Change(
            inserted=tuple(self.write.written),
            changed=tuple(layer.attention.name or "" for layer in form.layers) if one else (),
            says=f"{len(form.layers)} layers: {reads}",
        )

    def _op(
        self, before: ir.Node, op: str, inputs: Sequence[ir.Value | None], dtype: ir.DataType | None = None, **attributes: Any
    ) -> ir.Value:
        return self.write.op(before, op, inputs, attributes, dtype=dtype, stem=STEM)

    def _number(self, number: int) -> ir.Value:
        return self.write.number(number, _INT64)

    def _unit(self, before: ir.Node, keys: ir.Value) -> ir.Value:
        """Return `keys` (..., size) divided by their norms; what is zero stays."""
        dtype = self.known.types[keys]
        norm = self._op(before, "ReduceL2", [keys, self.write.integers(-1)], keepdims=1)
        return self._op(before, "Div", [keys, self._op(before, "Max", [norm, self.write.number(1e-6, dtype)])])

    # One token

    def _tell_page(self) -> None:
        before, at, integers = self.first, self.form.positions, self.write.integers
        page = self._op(before, "Div", [at, self._number(self.page)])
        self.at_page = self._op(before, "Unsqueeze", [page, integers(1)])
        self.at_row = self._op(before, "Unsqueeze", [page, integers(2, 3)])
        is_first = self._op(before, "Equal", [self._op(before, "Mod", [at, self._number(self.page)]), self._number(0)], _BOOL)
        self.is_first = self._op(before, "Unsqueeze", [is_first, integers(2, 3)])
        real = self._op(before, "Cast", [self.form.mask], _BOOL, to=int(_BOOL))
        self.is_real = self._op(before, "Unsqueeze", [real, integers(2, 3)])
        filled = self._op(before, "Add", [self._op(before, "Squeeze", [page, integers(1)]), self._number(1)])
        self.filled = self._op(before, "Cast", [filled], _INT32, to=int(_INT32))
        self.now = self._op(before, "Unsqueeze", [at, integers(2, 3)])

    def _renewed(self, layer: FixedLayer, pasts: Sequence[ir.Value]) -> list[ir.Value]:
        """Return what is told of the pages once the token's own is up to date."""
        before, key, heads, size = layer.attention, layer.key.new, layer.told.kv_heads, layer.key.told.size
        dtype = self.known.types[key]
        if (heads, size) not in self._shared:
            self._shared[heads, size] = self._op(self.first, "Expand", [self.at_row, self.write.integers(1, heads, 1, size)])
        index, outs = self._shared[heads, size], []
        new = key if self.op_of_pages is PAGE_SCORE_BOUND else self._unit(before, key)
        for word, past in zip(self.words, pasts, strict=True):
            old = self._op(before, "GatherElements", [past, index], axis=2)
            both = self._op(before, {"low": "Min", "high": "Max", "direction": "Add"}[word], [old, new])
            row = self._op(before, "Where", [self.is_first, new, both], dtype)
            row = self._op(before, "Where", [self.is_real, row, old], dtype)
            outs.append(self._op(before, "ScatterElements", [past, index, row], axis=2))
        return outs

    def _attend(self, layer: FixedLayer, told: Sequence[ir.Value], pages: int) -> None:
        """Let attention read the best pages, and the one that the token lies in."""
        node, integers = layer.attention, self.write.integers
        groups, window = layer.told.kv_heads, layer.told.window
        query = node.inputs[0]
        assert query is not None
        if layer.told.heads != groups:
            query = self._op(node, "Reshape", [query, integers(0, groups, -1, layer.key.told.size)])
        score = self._scored(node, [query, *told, self.filled])
        number = self.write.constant(np.arange(pages), _INT64)
        if window is not None:
            last = self.write.constant((np.arange(pages) + 1) * self.page - 1, _INT64)
            since = self._op(node, "Sub", [self._op(node, "Squeeze", [self.now, integers(3)]), self._number(window)])
            near = self._op(node, "Greater", [last, since], _BOOL)
            score = self._op(node, "Where", [near, score, self.write.number(-np.inf, _FLOAT)], _FLOAT)
        own = self._op(node, "Equal", [number, self.at_page], _BOOL)
        score = self._op(node, "Where", [own, self.write.number(np.inf, _FLOAT), score], _FLOAT)
        chosen = self._best(node, score)
        at = self._op(node, "Unsqueeze", [chosen, integers(3)])
        for place, side in ((1, layer.key), (2, layer.value)):
            size, heads = side.told.size, layer.told.kv_heads
            apart = self._op(node, "Reshape", [side.whole, integers(0, heads, pages, self.page * size)])
            read = self._op(node, "GatherND", [apart, at], batch_dims=2)
            rows = self._op(node, "Reshape", [read, integers(0, heads, self.keep * self.page, size)])
            rows.shape = ir.Shape((self.form.batch, heads, self.keep * self.page, size))
            node.replace_input_with(place, rows)
        first = self._op(node, "Mul", [at, self._number(self.page)])
        position = self._op(node, "Add", [first, self.write.constant(np.arange(self.page), _INT64)])
        position = self._op(node, "Reshape", [position, integers(0, groups, 1, self.keep * self.page)])
        seen = self._op(node, "LessOrEqual", [position, self.now], _BOOL)
        if window is not None:
            since = self._op(node, "Sub", [self.now, self._number(window)])
            seen = self._op(node, "And", [seen, self._op(node, "Greater", [position, since], _BOOL)])
        times = layer.told.heads // groups
        if times > 1:
            # ONNX Runtime takes no mask of one row for several queries.
            seen = self._op(node, "Expand", [seen, integers(1, 1, times, 1)])
        seen.shape = ir.Shape((self.form.batch, groups, times, self.keep * self.page))
        node.replace_input_with(3, seen)
        if layer.told.heads != groups:
            self._as_rows(node, query, layer)

    def _scored(self, before: ir.Node, inputs: Sequence[ir.Value]) -> ir.Value:
        """Return (batch, kv_heads, pages) float32."""
        op = self.op_of_pages
        node = ir.node(
            op.name, inputs, op.node_attributes({}), domain=op.domain, name=self.write.names.new(f"{STEM}_page_score")
        )
        return self.write.place(before, node, [_FLOAT])[0]

    def _best(self, before: ir.Node, score: ir.Value) -> ir.Value:
        """Return (batch, kv_heads, keep) int64: the pages of the highest scores."""
        node = ir.node(
            "TopK",
            [score, self.write.integers(self.keep)],
            {"axis": -1},
            num_outputs=2,
            name=self.write.names.new(f"{STEM}_topk"),
        )
        return self.write.place(before, node, [_FLOAT, _INT64])[1]

    def _as_rows(self, node: ir.Node, query: ir.Value, layer: FixedLayer) -> None:
        """Let `node` attend with `query` (batch, kv_heads, heads / kv_heads, size), and give what it gave before."""
        told, output = layer.told, node.outputs[0]
        times = told.heads // told.kv_heads
        query.shape = ir.Shape((self.form.batch, told.kv_heads, times, told.key.size))
        node.replace_input_with(0, query)
        nodes = list(self.graph)
        following = nodes[nodes.index(node) + 1]
        heads = self.write.integers(0, told.heads, 1, told.value.size)
        whole = self._op(following, "Reshape", [output, heads], self.known.types[output])
        whole.shape, output.shape = output.shape, ir.Shape((self.form.batch, told.kv_heads, times, told.value.size))
        for use in [*output.uses()]:
            if use.node is not whole.producer():
                use.node.replace_input_with(use.idx, whole)

    # Several tokens

    def _tell_pages(self) -> None:
        values = {value.name: value for value in self.graph.inputs} | {value.name: value for value in self.graph.outputs}
        before, integers = self.first, self.write.integers
        clock = self.states[LENGTH]
        length, following = (self._op(before, "Unsqueeze", [values[name], integers(1)]) for name in (clock.input, clock.output))
        self.length, self.following = length, following
        self.grows = self._op(before, "Less", [length, following], _BOOL)

    def _read_again(self, layer: FixedLayer, pasts: Sequence[ir.Value], pages: int) -> list[ir.Value]:
        """Return what is told of the pages, of which those that the step wrote into are read again."""
        before, integers, side = layer.attention, self.write.integers, layer.key
        dtype, heads, size = self.known.types[side.new], layer.told.kv_heads, side.told.size
        if pages not in self._shared:
            self._shared[pages] = self._written(pages)
        written = self._shared[pages]
        apart = self._op(before, "Reshape", [side.whole, integers(0, heads, pages, self.page, size)])
        slot = self.write.constant(np.arange(pages * self.page).reshape(1, 1, pages, self.page, 1), _INT64)
        end = self._op(before, "Unsqueeze", [self.following, integers(2, 3, 4)])
        filled = self._op(before, "Less", [slot, end], _BOOL)
        outs = []
        for word, past in zip(self.words, pasts, strict=True):
            op, rest = {"low": ("ReduceMin", np.inf), "high": ("ReduceMax", -np.inf), "direction": ("ReduceSum", 0.0)}[word]
            keys = self._unit(before, apart) if word == "direction" else apart
            keys = self._op(before, "Where", [filled, keys, self.write.number(rest, dtype)], dtype)
            found = self._op(before, op, [keys, integers(3)], keepdims=0)
            outs.append(self._op(before, "Where", [written, found, past], dtype))
        return outs

    def _written(self, pages: int) -> ir.Value:
        """Return (batch, 1, pages, 1) bool: which pages the tokens of the step lie in."""
        before = self.first
        start, end = (self.write.constant((np.arange(pages) + more) * self.page, _INT64) for more in (0, 1))
        behind = self._op(before, "Less", [start, self.following], _BOOL)
        written = self._op(before, "And", [behind, self._op(before, "Greater", [end, self.length], _BOOL)])
        written = self._op(before, "And", [written, self.grows])
        return self._op(before, "Unsqueeze", [written, self.write.integers(1, 3)])
