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

from ryzen_compile.ir.edit.builder import ModelInfo, NodeBuilder
from ryzen_compile.spec.kv_cache import LayerCacheSpec, write_kv_cache_spec
from ryzen_compile.spec.op import Op
from ryzen_compile.spec.passes import Change
from ryzen_passes.kv.state_editor import StateEditor
from ryzen_passes.kv.static.cache_view import StaticCacheLayer, StaticCacheView
from ryzen_passes.kv.static.step_positions import LENGTH_STATE, NODE_NAME_PREFIX
from ryzen_passes.opset import standard_opset
from ryzen_plugins.page_score import PAGE_SCORE_BOUND, PAGE_SCORE_COSINE

PAGE_SCORES: dict[str, tuple[Op, tuple[str, ...]]] = {
    "bound": (PAGE_SCORE_BOUND, ("low", "high")),
    "cosine": (PAGE_SCORE_COSINE, ("direction",)),
}
"""How pages are scored: the op, and what is kept of each page for it."""

METHOD = "select"
"""What the map of the caches calls it."""

_BOOL, _INT32, _INT64, _FLOAT = ir.DataType.BOOL, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.FLOAT


def select(view: StaticCacheView, model_info: ModelInfo, *, score: str, page_size: int, selected_pages: int) -> Change:
    """Rewrite `form` in place so that a step of one token reads `keep` pages of `page` tokens a head."""
    return _PageSelectionRewriter(view, model_info, score, page_size, selected_pages).run()


class _PageSelectionRewriter:
    def __init__(self, view: StaticCacheView, model_info: ModelInfo, score: str, page_size: int, selected_pages: int) -> None:
        self.view, self.model_info = view, model_info
        self.graph = view.model.graph
        self.writer = NodeBuilder(self.graph, model_info)
        self.score = score
        self.page_score_op, self.summary_names = PAGE_SCORES[score]
        self.page_size, self.selected_pages = page_size, selected_pages
        self.states = StateEditor(self.writer, view.interface)
        self.layer_specs: list[LayerCacheSpec] = []
        self._shared: dict[object, ir.Value] = {}

    def run(self) -> Change:
        form = self.view
        self.insertion_point = form.first_node_after_positions()
        one = form.seq == 1
        (self._write_current_page if one else self._write_step_range)()
        for at, layer in enumerate(form.layers):
            pages = (layer.spec.slots or 0) // self.page_size
            dtype = self.model_info.types[layer.key.update]
            shape = ir.Shape((form.batch, layer.spec.kv_heads, pages, layer.key.spec.head_size))
            pasts = [self.states.add_input(f"{word}.{at}", dtype, shape) for word in self.summary_names]
            outs = self._update_summaries(layer, pasts) if one else self._recompute_summaries(layer, pasts, pages)
            for word, value in zip(self.summary_names, outs, strict=True):
                self.states.set_output(f"{word}.{at}", value, in_place=one)
            if one:
                self._attend_to_pages(layer, outs, pages)
            told = msgspec.structs.replace(
                layer.spec, method=METHOD, page_size=self.page_size, selected_pages=self.selected_pages, page_score=self.score
            )
            self.layer_specs.append(told)
        if one:
            self.page_score_op.add_to(form.model)
            function = form.model.functions[self.page_score_op.ir_function().identifier()]
            function.opset_imports[""] = standard_opset(form.model)
        self.states.write_interface(form.model, form.interface)
        write_kv_cache_spec(form.model, msgspec.structs.replace(form.spec, layers=tuple(self.layer_specs)))
        reads = (
            f"a token reads {self.selected_pages} pages of {self.page_size} tokens a head"
            if one
            else "pages are told for steps of one token"
        )
        return Change(
            inserted=tuple(self.writer.inserted),
            changed=tuple(layer.attention.name or "" for layer in form.layers) if one else (),
            summary=f"{len(form.layers)} layers: {reads}",
        )

    def _op(
        self, before: ir.Node, op: str, inputs: Sequence[ir.Value | None], dtype: ir.DataType | None = None, **attributes: Any
    ) -> ir.Value:
        return self.writer.op(before, op, inputs, attributes, dtype=dtype, name_prefix=NODE_NAME_PREFIX)

    def _int64(self, number: int) -> ir.Value:
        return self.writer.scalar(number, _INT64)

    def _normalize(self, before: ir.Node, keys: ir.Value) -> ir.Value:
        """Return `keys` (..., size) divided by their norms; what is zero stays."""
        dtype = self.model_info.types[keys]
        norm = self._op(before, "ReduceL2", [keys, self.writer.int64_vector(-1)], keepdims=1)
        return self._op(before, "Div", [keys, self._op(before, "Max", [norm, self.writer.scalar(1e-6, dtype)])])

    # One token

    def _write_current_page(self) -> None:
        before, at, integers = self.insertion_point, self.view.positions, self.writer.int64_vector
        page = self._op(before, "Div", [at, self._int64(self.page_size)])
        self.page_index = self._op(before, "Unsqueeze", [page, integers(1)])
        self.page_row_index = self._op(before, "Unsqueeze", [page, integers(2, 3)])
        is_first = self._op(
            before, "Equal", [self._op(before, "Mod", [at, self._int64(self.page_size)]), self._int64(0)], _BOOL
        )
        self.starts_page = self._op(before, "Unsqueeze", [is_first, integers(2, 3)])
        real = self._op(before, "Cast", [self.view.mask], _BOOL, to=int(_BOOL))
        self.token_mask = self._op(before, "Unsqueeze", [real, integers(2, 3)])
        filled = self._op(before, "Add", [self._op(before, "Squeeze", [page, integers(1)]), self._int64(1)])
        self.filled_pages = self._op(before, "Cast", [filled], _INT32, to=int(_INT32))
        self.query_position = self._op(before, "Unsqueeze", [at, integers(2, 3)])

    def _update_summaries(self, layer: StaticCacheLayer, past_summaries: Sequence[ir.Value]) -> list[ir.Value]:
        """Return what is told of the pages once the token's own is up to date."""
        before, key, heads, size = layer.attention, layer.key.update, layer.spec.kv_heads, layer.key.spec.head_size
        dtype = self.model_info.types[key]
        if (heads, size) not in self._shared:
            self._shared[heads, size] = self._op(
                self.insertion_point, "Expand", [self.page_row_index, self.writer.int64_vector(1, heads, 1, size)]
            )
        index, outs = self._shared[heads, size], []
        new = key if self.page_score_op is PAGE_SCORE_BOUND else self._normalize(before, key)
        for word, past in zip(self.summary_names, past_summaries, strict=True):
            old = self._op(before, "GatherElements", [past, index], axis=2)
            both = self._op(before, {"low": "Min", "high": "Max", "direction": "Add"}[word], [old, new])
            row = self._op(before, "Where", [self.starts_page, new, both], dtype)
            row = self._op(before, "Where", [self.token_mask, row, old], dtype)
            outs.append(self._op(before, "ScatterElements", [past, index, row], axis=2))
        return outs

    def _attend_to_pages(self, layer: StaticCacheLayer, summaries: Sequence[ir.Value], pages: int) -> None:
        """Let attention read the best pages, and the one that the token lies in."""
        node, integers = layer.attention, self.writer.int64_vector
        groups, window = layer.spec.kv_heads, layer.spec.window
        query = node.inputs[0]
        assert query is not None
        if layer.spec.heads != groups:
            query = self._op(node, "Reshape", [query, integers(0, groups, -1, layer.key.spec.head_size)])
        score = self._score_pages(node, [query, *summaries, self.filled_pages])
        number = self.writer.constant(np.arange(pages), _INT64)
        if window is not None:
            last = self.writer.constant((np.arange(pages) + 1) * self.page_size - 1, _INT64)
            since = self._op(node, "Sub", [self._op(node, "Squeeze", [self.query_position, integers(3)]), self._int64(window)])
            near = self._op(node, "Greater", [last, since], _BOOL)
            score = self._op(node, "Where", [near, score, self.writer.scalar(-np.inf, _FLOAT)], _FLOAT)
        own = self._op(node, "Equal", [number, self.page_index], _BOOL)
        score = self._op(node, "Where", [own, self.writer.scalar(np.inf, _FLOAT), score], _FLOAT)
        chosen = self._top_pages(node, score)
        at = self._op(node, "Unsqueeze", [chosen, integers(3)])
        for place, side in ((1, layer.key), (2, layer.value)):
            size, heads = side.spec.head_size, layer.spec.kv_heads
            apart = self._op(node, "Reshape", [side.cache, integers(0, heads, pages, self.page_size * size)])
            read = self._op(node, "GatherND", [apart, at], batch_dims=2)
            rows = self._op(node, "Reshape", [read, integers(0, heads, self.selected_pages * self.page_size, size)])
            rows.shape = ir.Shape((self.view.batch, heads, self.selected_pages * self.page_size, size))
            node.replace_input_with(place, rows)
        first = self._op(node, "Mul", [at, self._int64(self.page_size)])
        position = self._op(node, "Add", [first, self.writer.constant(np.arange(self.page_size), _INT64)])
        position = self._op(node, "Reshape", [position, integers(0, groups, 1, self.selected_pages * self.page_size)])
        seen = self._op(node, "LessOrEqual", [position, self.query_position], _BOOL)
        if window is not None:
            since = self._op(node, "Sub", [self.query_position, self._int64(window)])
            seen = self._op(node, "And", [seen, self._op(node, "Greater", [position, since], _BOOL)])
        times = layer.spec.heads // groups
        if times > 1:
            # ONNX Runtime takes no mask of one row for several queries.
            seen = self._op(node, "Expand", [seen, integers(1, 1, times, 1)])
        seen.shape = ir.Shape((self.view.batch, groups, times, self.selected_pages * self.page_size))
        node.replace_input_with(3, seen)
        if layer.spec.heads != groups:
            self._fold_heads_into_rows(node, query, layer)

    def _score_pages(self, before: ir.Node, inputs: Sequence[ir.Value]) -> ir.Value:
        """Return (batch, kv_heads, pages) float32."""
        op = self.page_score_op
        node = ir.node(
            op.name,
            inputs,
            op.node_attributes({}),
            domain=op.domain,
            name=self.writer.names.allocate(f"{NODE_NAME_PREFIX}_page_score"),
        )
        return self.writer.insert_node(before, node, [_FLOAT])[0]

    def _top_pages(self, before: ir.Node, score: ir.Value) -> ir.Value:
        """Return (batch, kv_heads, keep) int64: the pages of the highest scores."""
        node = ir.node(
            "TopK",
            [score, self.writer.int64_vector(self.selected_pages)],
            {"axis": -1},
            num_outputs=2,
            name=self.writer.names.allocate(f"{NODE_NAME_PREFIX}_topk"),
        )
        return self.writer.insert_node(before, node, [_FLOAT, _INT64])[1]

    def _fold_heads_into_rows(self, node: ir.Node, query: ir.Value, layer: StaticCacheLayer) -> None:
        """Let `node` attend with `query` (batch, kv_heads, heads / kv_heads, size), and give what it gave before."""
        told, output = layer.spec, node.outputs[0]
        times = told.heads // told.kv_heads
        query.shape = ir.Shape((self.view.batch, told.kv_heads, times, told.key.head_size))
        node.replace_input_with(0, query)
        nodes = list(self.graph)
        following = nodes[nodes.index(node) + 1]
        heads = self.writer.int64_vector(0, told.heads, 1, told.value.head_size)
        whole = self._op(following, "Reshape", [output, heads], self.model_info.types[output])
        whole.shape, output.shape = output.shape, ir.Shape((self.view.batch, told.kv_heads, times, told.value.head_size))
        for use in [*output.uses()]:
            if use.node is not whole.producer():
                use.node.replace_input_with(use.idx, whole)

    # Several tokens

    def _write_step_range(self) -> None:
        values = {value.name: value for value in self.graph.inputs} | {value.name: value for value in self.graph.outputs}
        before, integers = self.insertion_point, self.writer.int64_vector
        clock = self.states[LENGTH_STATE]
        length, following = (self._op(before, "Unsqueeze", [values[name], integers(1)]) for name in (clock.input, clock.output))
        self.length, self.next_length = length, following
        self.has_tokens = self._op(before, "Less", [length, following], _BOOL)

    def _recompute_summaries(self, layer: StaticCacheLayer, past_summaries: Sequence[ir.Value], pages: int) -> list[ir.Value]:
        """Return what is told of the pages, of which those that the step wrote into are read again."""
        before, integers, side = layer.attention, self.writer.int64_vector, layer.key
        dtype, heads, size = self.model_info.types[side.update], layer.spec.kv_heads, side.spec.head_size
        if pages not in self._shared:
            self._shared[pages] = self._written_pages(pages)
        written = self._shared[pages]
        apart = self._op(before, "Reshape", [side.cache, integers(0, heads, pages, self.page_size, size)])
        slot = self.writer.constant(np.arange(pages * self.page_size).reshape(1, 1, pages, self.page_size, 1), _INT64)
        end = self._op(before, "Unsqueeze", [self.next_length, integers(2, 3, 4)])
        filled = self._op(before, "Less", [slot, end], _BOOL)
        outs = []
        for word, past in zip(self.summary_names, past_summaries, strict=True):
            op, rest = {"low": ("ReduceMin", np.inf), "high": ("ReduceMax", -np.inf), "direction": ("ReduceSum", 0.0)}[word]
            keys = self._normalize(before, apart) if word == "direction" else apart
            keys = self._op(before, "Where", [filled, keys, self.writer.scalar(rest, dtype)], dtype)
            found = self._op(before, op, [keys, integers(3)], keepdims=0)
            outs.append(self._op(before, "Where", [written, found, past], dtype))
        return outs

    def _written_pages(self, pages: int) -> ir.Value:
        """Return (batch, 1, pages, 1) bool: which pages the tokens of the step lie in."""
        before = self.insertion_point
        start, end = (self.writer.constant((np.arange(pages) + more) * self.page_size, _INT64) for more in (0, 1))
        behind = self._op(before, "Less", [start, self.next_length], _BOOL)
        written = self._op(before, "And", [behind, self._op(before, "Greater", [end, self.length], _BOOL)])
        written = self._op(before, "And", [written, self.has_tokens])
        return self._op(before, "Unsqueeze", [written, self.writer.int64_vector(1, 3)])
