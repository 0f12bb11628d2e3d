"""Write page selection: caches keep every token, and a step of one token reads only the pages of the highest scores.

A page is a run of consecutive slots. Its keys are summarized by one or two rows: their elementwise minimum and maximum, or the
sum of their directions. A step of one token updates the summary of its own page, scores the pages for its queries with
PageScoreBound or PageScoreCosine, gathers the best pages and attends over them. The query heads that share a kv-head share its
pages, and become the rows of one attention. A step of several tokens reads every page, and recomputes the summaries of the
pages that it writes to.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.edit.builder import ModelInfo, next_node
from ryzen_compile.spec.kv_cache import PageScore, PageSelection
from ryzen_compile.spec.op import Op
from ryzen_compile.spec.passes import Change
from ryzen_passes.kv.cache_rewriter import CacheRewriter
from ryzen_passes.kv.static.cache_view import StaticCacheLayer, StaticCacheView
from ryzen_passes.kv.static.step_positions import NODE_NAME_PREFIX
from ryzen_plugins.page_score import PAGE_SCORE_BOUND, PAGE_SCORE_COSINE

PAGE_SCORES: dict[PageScore, tuple[Op, tuple[str, ...]]] = {
    "bound": (PAGE_SCORE_BOUND, ("low", "high")),
    "cosine": (PAGE_SCORE_COSINE, ("direction",)),
}
"""The op of each page score, and the names of its summary states."""

_UPDATE_OPS = {"low": "Min", "high": "Max", "direction": "Add"}
"""The op that adds a key to a summary."""
_REDUCTIONS = {"low": ("ReduceMin", np.inf), "high": ("ReduceMax", -np.inf), "direction": ("ReduceSum", 0.0)}
"""The op that computes a summary from all keys of a page, and its neutral element."""

_BOOL, _INT32, _INT64, _FLOAT = ir.DataType.BOOL, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.FLOAT


def select(view: StaticCacheView, model_info: ModelInfo, *, score: PageScore, page_size: int, selected_pages: int) -> Change:
    """Rewrite `view` in place so that a step of one token reads `selected_pages` pages of `page_size` tokens per head."""
    return _PageSelectionRewriter(view, model_info, score, page_size, selected_pages).run()


class _PageSelectionRewriter(CacheRewriter):
    """The rewrite of one graph to page selection."""

    def __init__(
        self, view: StaticCacheView, model_info: ModelInfo, score: PageScore, page_size: int, selected_pages: int
    ) -> None:
        super().__init__(view, model_info)
        self.score = score
        self.page_score_op, self.summary_names = PAGE_SCORES[score]
        self.page_size, self.selected_pages = page_size, selected_pages

    def run(self) -> Change:
        if self.single_token:
            self._write_current_page()
        else:
            self._write_step_range()
        layers = [(index, layer) for index, layer in enumerate(self.view.layers) if not layer.spec.has_exact_ring]
        for index, layer in layers:
            pages = layer.slots // self.page_size
            dtype = self.model_info.types[layer.key.update]
            shape = self.cache_shape(layer, pages, layer.key.spec.head_size)
            past = [self.states.add_input(f"{name}.{index}", dtype, shape) for name in self.summary_names]
            if self.single_token:
                summaries = self._update_summaries(layer, past)
            else:
                summaries = self._recompute_summaries(layer, past, pages)
            for name, summary in zip(self.summary_names, summaries, strict=True):
                self.states.set_output(f"{name}.{index}", summary, in_place=self.single_token)
            if self.single_token:
                self._attend_to_pages(layer, summaries, pages)
            self.record_layer(
                layer,
                policy=PageSelection(
                    slots=layer.slots,
                    score=self.score,
                    page_size=self.page_size,
                    selected_pages=self.selected_pages,
                    summary_states=tuple(f"{name}.{index}" for name in self.summary_names),
                    attended="other" if self.single_token else "cache",
                ),
            )
        effect = (
            f"a token reads {self.selected_pages} pages of {self.page_size} tokens per head"
            if self.single_token
            else "page summaries are computed for steps of one token"
        )
        changed = [layer for _, layer in layers] if self.single_token else ()
        return self.finish(f"{len(layers)} layers: {effect}", changed=changed)

    def _normalize(self, before: ir.Node, keys: ir.Value) -> ir.Value:
        """Return `keys` (..., head_size) divided by their norms; zero vectors stay zero."""
        dtype = self.model_info.types[keys]
        norm = self.op(before, "ReduceL2", [keys, self.writer.int64_vector(-1)], keepdims=1)
        return self.op(before, "Div", [keys, self.op(before, "Max", [norm, self.writer.scalar(1e-6, dtype)])])

    # One token

    def _write_current_page(self) -> None:
        """Write the nodes that compute the page of the token."""
        before, position, integers = self.insertion_point, self.view.positions, self.writer.int64_vector
        page = self.op(before, "Div", [position, self.int64(self.page_size)])
        self.page_index = self.unsqueeze(before, page, 1)
        self.page_row_index = self.unsqueeze(before, page, 2, 3)
        offset = self.op(before, "Mod", [position, self.int64(self.page_size)])
        starts_page = self.op(before, "Equal", [offset, self.int64(0)], _BOOL)
        self.starts_page = self.unsqueeze(before, starts_page, 2, 3)
        self.is_token = self.unsqueeze(before, self.bool_mask(), 2, 3)
        count = self.op(before, "Add", [self.op(before, "Squeeze", [page, integers(1)]), self.int64(1)])
        self.filled_pages = self.cast(before, count, _INT32)
        self.query_position = self.unsqueeze(before, position, 2, 3)

    def _update_summaries(self, layer: StaticCacheLayer, past_summaries: Sequence[ir.Value]) -> list[ir.Value]:
        """Return the summaries of all pages, with that of the token's page updated."""
        before, key, heads, size = layer.attention, layer.key.update, layer.spec.kv_heads, layer.key.spec.head_size
        dtype = self.model_info.types[key]
        index = self.shared((heads, size), lambda: self.expand(self.insertion_point, self.page_row_index, 1, heads, 1, size))
        summaries = []
        new = key if self.page_score_op is PAGE_SCORE_BOUND else self._normalize(before, key)
        for name, past in zip(self.summary_names, past_summaries, strict=True):
            old = self.op(before, "GatherElements", [past, index], axis=2)
            updated = self.op(before, _UPDATE_OPS[name], [old, new])
            row = self.op(before, "Where", [self.starts_page, new, updated], dtype)
            row = self.op(before, "Where", [self.is_token, row, old], dtype)
            summaries.append(self.op(before, "ScatterElements", [past, index, row], axis=2))
        return summaries

    def _attend_to_pages(self, layer: StaticCacheLayer, summaries: Sequence[ir.Value], pages: int) -> None:
        """Make attention read the pages of the highest scores and the page of the token."""
        node, spec = layer.attention, layer.spec
        heads, selected_tokens = spec.kv_heads, self.selected_pages * self.page_size
        query = node.inputs[0]
        assert query is not None
        if spec.heads != heads:
            query = self.reshape(node, query, 0, heads, -1, spec.key.head_size)
        (score,) = self.custom_op(node, self.page_score_op, [query, *summaries, self.filled_pages], [_FLOAT])
        indices = self.unsqueeze(node, self._top_pages(node, self._mask_scores(layer, score, pages)), 3)
        for input_index, tensor in ((1, layer.key), (2, layer.value)):
            size = tensor.spec.head_size
            by_page = self.reshape(node, tensor.cache, 0, heads, pages, self.page_size * size)
            gathered = self.op(node, "GatherND", [by_page, indices], batch_dims=2)
            rows = self.reshape(
                node, gathered, 0, heads, selected_tokens, size, shape=self.cache_shape(layer, selected_tokens, size)
            )
            node.replace_input_with(input_index, rows)
        self.replace_mask(layer, self._visible_tokens(layer, indices))
        if spec.heads != heads:
            self._fold_heads_into_rows(node, query, layer)

    def _mask_scores(self, layer: StaticCacheLayer, score: ir.Value, pages: int) -> ir.Value:
        """Return `score` (batch, kv_heads, pages): -inf for pages outside the attention window, inf for the token's page."""
        node = layer.attention
        if layer.spec.window is not None:
            last_position = self.writer.constant((np.arange(pages) + 1) * self.page_size - 1, _INT64)
            query = self.op(node, "Squeeze", [self.query_position, self.writer.int64_vector(3)])
            in_window = self.visible_positions(node, last_position, start=self.window_start(node, query, layer.spec.window))
            score = self.op(node, "Where", [in_window, score, self.writer.scalar(-np.inf, _FLOAT)], _FLOAT)
        is_own = self.op(node, "Equal", [self.arange(0, pages), self.page_index], _BOOL)
        return self.op(node, "Where", [is_own, self.writer.scalar(np.inf, _FLOAT), score], _FLOAT)

    def _top_pages(self, before: ir.Node, score: ir.Value) -> ir.Value:
        """Return (batch, kv_heads, selected_pages) int64: the pages of the highest scores."""
        node = ir.node(
            "TopK",
            [score, self.writer.int64_vector(self.selected_pages)],
            {"axis": -1},
            num_outputs=2,
            name=self.writer.names.allocate(f"{NODE_NAME_PREFIX}_topk"),
        )
        return self.writer.insert_node(before, node, [_FLOAT, _INT64])[1]

    def _visible_tokens(self, layer: StaticCacheLayer, page_indices: ir.Value) -> ir.Value:
        """Return (batch, kv_heads, heads / kv_heads, selected tokens) bool: the selected tokens that the query sees."""
        node = layer.attention
        heads, selected_tokens = layer.spec.kv_heads, self.selected_pages * self.page_size
        first = self.op(node, "Mul", [page_indices, self.int64(self.page_size)])
        position = self.op(node, "Add", [first, self.arange(0, self.page_size)])
        position = self.reshape(node, position, 0, heads, 1, selected_tokens)
        visible = self.visible_positions(node, position, query=self.query_position, window=layer.spec.window)
        queries_per_head = layer.spec.heads // heads
        if queries_per_head > 1:
            # Attention in ONNX Runtime does not broadcast a mask along the query axis.
            visible = self.expand(node, visible, 1, 1, queries_per_head, 1)
        visible.shape = self.cache_shape(layer, queries_per_head, selected_tokens)
        return visible

    def _fold_heads_into_rows(self, node: ir.Node, query: ir.Value, layer: StaticCacheLayer) -> None:
        """Make `node` attend with `query` (batch, kv_heads, heads / kv_heads, head_size), and restore its output shape."""
        spec, output = layer.spec, node.outputs[0]
        queries_per_head = spec.heads // spec.kv_heads
        query.shape = self.cache_shape(layer, queries_per_head, spec.key.head_size)
        node.replace_input_with(0, query)
        shape = self.writer.int64_vector(0, spec.heads, 1, spec.value.head_size)
        unfolded = self.op(next_node(self.graph, node), "Reshape", [output, shape], self.model_info.types[output])
        unfolded.shape = output.shape
        output.shape = self.cache_shape(layer, queries_per_head, spec.value.head_size)
        for use in [*output.uses()]:
            if use.node is not unfolded.producer():
                use.node.replace_input_with(use.idx, unfolded)

    # Several tokens

    def _write_step_range(self) -> None:
        """Write the nodes that compute the range of positions of the step."""
        before = self.insertion_point
        self.length, self.next_length = (
            self.unsqueeze(before, value, 1) for value in (self.view.length, self.view.next_length)
        )
        self.has_tokens = self.op(before, "Less", [self.length, self.next_length], _BOOL)

    def _recompute_summaries(self, layer: StaticCacheLayer, past_summaries: Sequence[ir.Value], pages: int) -> list[ir.Value]:
        """Return the summaries of all pages, with those of the pages that the step writes to recomputed from their keys."""
        before, integers, key = layer.attention, self.writer.int64_vector, layer.key
        dtype, heads, size = self.model_info.types[key.update], layer.spec.kv_heads, key.spec.head_size
        is_written = self.shared(pages, lambda: self._written_pages(pages))
        by_page = self.reshape(before, key.cache, 0, heads, pages, self.page_size, size)
        slot = self.writer.constant(np.arange(pages * self.page_size).reshape(1, 1, pages, self.page_size, 1), _INT64)
        end = self.unsqueeze(before, self.next_length, 2, 3, 4)
        is_filled = self.op(before, "Less", [slot, end], _BOOL)
        summaries = []
        for name, past in zip(self.summary_names, past_summaries, strict=True):
            op_type, neutral = _REDUCTIONS[name]
            keys = self._normalize(before, by_page) if name == "direction" else by_page
            keys = self.op(before, "Where", [is_filled, keys, self.writer.scalar(neutral, dtype)], dtype)
            recomputed = self.op(before, op_type, [keys, integers(3)], keepdims=0)
            summaries.append(self.op(before, "Where", [is_written, recomputed, past], dtype))
        return summaries

    def _written_pages(self, pages: int) -> ir.Value:
        """Return (batch, 1, pages, 1) bool: the pages that the tokens of the step are written to."""
        before = self.insertion_point
        start, end = (self.writer.constant((np.arange(pages) + offset) * self.page_size, _INT64) for offset in (0, 1))
        starts_before_end = self.op(before, "Less", [start, self.next_length], _BOOL)
        ends_after_start = self.op(before, "Greater", [end, self.length], _BOOL)
        is_written = self.op(before, "And", [starts_before_end, ends_after_start])
        is_written = self.op(before, "And", [is_written, self.has_tokens])
        return self.unsqueeze(before, is_written, 1, 3)
