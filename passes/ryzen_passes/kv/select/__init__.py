"""kv-select: keep every token in the cache, and let each query read only the pages that score highest for it (Quest)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ryzen_compile.backends.traits import find_traits
from ryzen_compile.spec.passes import Change, PassContext, PassEstimate, Refusal
from ryzen_passes.kv.static_cache_pass import StaticCachePass

if TYPE_CHECKING:
    import torch

    from ryzen_compile.ir.edit.builder import ModelInfo
    from ryzen_compile.spec.kv_cache import KVCacheSpec
    from ryzen_passes.kv.static.cache_view import StaticCacheView


@dataclass(frozen=True, kw_only=True)
class KvSelect(StaticCachePass):
    """Let a step of one token read `selected-pages` pages of `page-size` tokens per head: those of the highest scores.

    The page of the token itself is always among them. Nothing is evicted: the next query selects anew. Exact while a sequence
    fits into the selected pages. Each kv-head selects for all query heads that share it. A step of several tokens reads every
    page. Layers with a ring buffer, which holds their attention window only, are read as a whole.
    """

    name: ClassVar[str] = "kv-select"

    page_score: Literal["bound", "cosine"] = "bound"
    """`bound`: an upper bound of the product of the query with any key of the page (Quest, arXiv 2406.10774), from two rows per
    page. `cosine`: the cosine with the mean direction of the page's keys, from one row per page; not a bound."""
    page_size: int = 16
    """Tokens per page, at least 1; must divide the capacity."""
    selected_pages: int
    """Number of pages that a query reads, its own page included, at least 1."""

    def estimate_view(self, view: StaticCacheView, config: None) -> PassEstimate:
        """Return the change in bytes of the states of one sequence: the page summaries."""
        from ryzen_passes.kv.select.rewrite import PAGE_SCORES

        state_bytes = read_bytes = 0
        for layer in view.layers:
            if layer.spec.has_exact_ring:
                continue
            pages, kv_heads = layer.slots // self.page_size, layer.spec.kv_heads
            state_bytes += len(PAGE_SCORES[self.page_score][1]) * kv_heads * layer.key.row_bytes * pages
            read_bytes += kv_heads * layer.row_bytes * self.page_size * self.selected_pages
        return PassEstimate(
            state_bytes=state_bytes,
            reason=f"each token reads and copies {read_bytes} bytes of keys and values: {self.selected_pages} of "
            f"{view.capacity // self.page_size} pages",
        )

    def rewrite_view(self, view: StaticCacheView, model_info: ModelInfo, config: None, context: PassContext) -> Change:
        """Rewrite in place."""
        from ryzen_passes.kv.select.rewrite import select

        return select(view, model_info, score=self.page_score, page_size=self.page_size, selected_pages=self.selected_pages)

    @classmethod
    def torch_cache_factory(
        cls, spec: KVCacheSpec, *, single_token: bool, module: torch.nn.Module | None = None, statistics: Sequence[Path] = ()
    ) -> Callable[[], Any] | None:
        """Return a factory of Transformers caches of which a single query reads the same pages.

        None if no layer selects or caches are quantized.
        """
        from ryzen_compile.spec.kv_cache import PageSelection

        if not spec.is_unquantized or not any(isinstance(layer.policy, PageSelection) for layer in spec.layers):
            return None
        from ryzen_passes.kv.select.torch_reference import selecting_cache_factory

        return selecting_cache_factory(spec, single_token=single_token, module=module)

    def configure(self, view: StaticCacheView, context: PassContext) -> Refusal | None:
        """Return None, as the options are the configuration, or the reason why they do not apply to `view`."""
        from ryzen_passes.kv.static.cache_view import refuse_alibi

        if (refusal := refuse_alibi(view)) is not None:
            return refusal
        hint = "set the size and number of pages that a query reads: kv-select{page-size=16,selected-pages=64}"
        if self.page_size < 1:
            return Refusal(reason=f"`page-size` must be at least 1 (got {self.page_size})", location="page-size", hint=hint)
        if self.selected_pages < 1:
            return Refusal(
                reason=f"`selected-pages` must be at least 1 (got {self.selected_pages})", location="selected-pages", hint=hint
            )
        capacity = view.capacity
        pages = capacity // self.page_size
        if all(layer.spec.has_exact_ring for layer in view.layers):
            return Refusal(
                reason="every layer has an attention window and keeps that window only, so there are no pages to select",
                location=view.layers[0].spec.attention_node,
                hint=f"leave `kv-select` out, or select within the window: kv-static{{capacity={capacity},ring-buffers=false}}",
            )
        if any(layer.slots % self.page_size for layer in view.layers if not layer.spec.has_exact_ring):
            return Refusal(
                reason=f"the capacity of {capacity} tokens is not a multiple of `page-size` {self.page_size}",
                location="page-size",
                hint=f"kv-static{{capacity={max(pages, 1) * self.page_size}}}",
            )
        if self.selected_pages > pages:
            return Refusal(
                reason=f"`selected-pages` {self.selected_pages} exceeds the {pages} pages of the cache "
                f"(capacity {capacity}, `page-size` {self.page_size})",
                location="selected-pages",
                hint=f"set `selected-pages` to at most {pages}",
            )
        max_topk = find_traits(context.backend).max_topk
        if max_topk is not None and self.selected_pages > max_topk:
            return Refusal(
                reason=f"`selected-pages` {self.selected_pages} exceeds the maximum of {max_topk} on {context.backend} (TopK)",
                location="selected-pages",
                hint="raise `page-size`, and lower `selected-pages` accordingly",
            )
        return None
