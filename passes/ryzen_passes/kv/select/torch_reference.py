"""PyTorch reference of kv-select: a Transformers cache in which a single query reads the pages that the graph selects."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from ryzen_compile.spec.kv_cache import KVCacheSpec, LayerCacheSpec, PageSelection
from ryzen_passes.kv.query_aware_cache import ExactLayer, QueryAwareLayer, expose_queries


def _bound(queries: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """Return (batch, kv_heads, group, pages): an upper bound of the product of each query with any key of the page."""
    low, high = pages.amin(dim=3), pages.amax(dim=3)
    return queries.clamp(min=0) @ high.transpose(2, 3) + queries.clamp(max=0) @ low.transpose(2, 3)


def _cosine(queries: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """Return (batch, kv_heads, group, pages): the cosine of each query with the sum of the page's normalized keys."""
    normalize = functools.partial(torch.nn.functional.normalize, dim=-1, eps=1e-6)
    return normalize(queries) @ normalize(normalize(pages).sum(dim=3)).transpose(2, 3)


_PAGE_SCORES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"bound": _bound, "cosine": _cosine}
"""Score name -> function of float32 queries (batch, kv_heads, group, head_size) and the keys of pages (batch, kv_heads, pages,
page_size, head_size)."""


class SelectingLayer(QueryAwareLayer):
    """Cache layer that holds every token in order and limits a single query to the selected pages."""

    def __init__(self, spec: LayerCacheSpec, policy: PageSelection) -> None:
        """Create an empty layer that follows `policy`."""
        super().__init__(spec)
        self._policy = policy

    def visible_rows(self, queries: torch.Tensor) -> torch.Tensor:
        """Return the rows that each query attends to.

        In a step of one token these are the best `selected_pages` pages of each KV head, which include the page of the token.
        """
        visible = self.causal_visibility(queries.shape[3])
        if queries.shape[3] > 1:
            return visible
        page_size, full_pages = self._policy.page_size, (self._seen_tokens - 1) // self._policy.page_size
        pages = self.keys[:, :, : full_pages * page_size].float().unflatten(2, (full_pages, page_size))
        scores = _PAGE_SCORES[self._policy.score](queries[:, :, :, 0].float(), pages).amax(dim=2)
        if self._spec.window is not None:
            last_positions = torch.arange(1, full_pages + 1, device=scores.device) * page_size - 1
            scores = scores.masked_fill(last_positions < self._seen_tokens - self._spec.window, -torch.inf)
        scores = torch.nn.functional.pad(scores, (0, 1), value=torch.inf)
        selected = scores.argsort(dim=2, descending=True, stable=True)[:, :, : self._policy.selected_pages]
        is_selected = torch.zeros_like(scores, dtype=torch.bool).scatter(2, selected, value=True)
        return visible & is_selected.repeat_interleave(page_size, dim=2)[:, :, None, : self._seen_tokens]


def selecting_cache_factory(
    spec: KVCacheSpec, *, single_token: bool, module: torch.nn.Module | None = None
) -> Callable[[], Cache]:
    """Return a factory for empty Transformers caches that follow the page selection in `spec`.

    `single_token` and `module` are as in `KVCacheReference`; without `single_token` every query reads all pages. Raises
    ModelError if `spec` has no Transformers equivalent, or if `module` is needed and None.
    """
    if not single_token:
        factory: Callable[[], Cache] = DynamicCache
        return factory
    expose_queries(module, len(spec.layers), "the set of selected pages depends on the queries")

    def create_layer(layer: LayerCacheSpec) -> QueryAwareLayer:
        return SelectingLayer(layer, layer.policy) if isinstance(layer.policy, PageSelection) else ExactLayer(layer)

    return lambda: Cache(layers=[create_layer(layer) for layer in spec.layers])
