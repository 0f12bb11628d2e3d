"""Selecting in plain torch: caches that keep every token, of which a single query reads the pages that a graph's reads."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from ryzen_compile.spec.kv_cache import KVCacheSpec
from ryzen_passes.kv.query_aware_cache import QueryAwareLayer, check_supported, expose_queries


def _bound(queries: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """No product with a key of the page is larger."""
    low, high = pages.amin(dim=3), pages.amax(dim=3)
    return queries.clamp(min=0) @ high.transpose(2, 3) + queries.clamp(max=0) @ low.transpose(2, 3)


def _cosine(queries: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """The cosine with the sum of the directions of the page's keys."""
    along = functools.partial(torch.nn.functional.normalize, dim=-1, eps=1e-6)
    return along(queries) @ along(along(pages).sum(dim=3)).transpose(2, 3)


_PAGE_SCORES: dict[str | None, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"bound": _bound, "cosine": _cosine}
"""What pages (batch, kv_heads, pages, tokens, size) are worth to queries (batch, kv_heads, group, size), all float32."""


class SelectingLayer(QueryAwareLayer):
    """Every token of one layer, in order."""

    def visible_rows(self, queries: torch.Tensor) -> torch.Tensor:
        """As QueriedLayer says: of a step of one token the best pages of each kv-head, the token's own among them."""
        seen = self.causal_visibility(queries.shape[3])
        if queries.shape[3] > 1:
            return seen
        page, own = self._spec.page_size, (self._seen_tokens - 1) // self._spec.page_size
        pages = self.keys[:, :, : own * page].float().unflatten(2, (own, page))
        worth = _PAGE_SCORES[self._spec.page_score](queries[:, :, :, 0].float(), pages).amax(dim=2)
        if self._spec.window is not None:
            last = torch.arange(1, own + 1, device=worth.device) * page - 1
            worth = worth.masked_fill(last < self._seen_tokens - self._spec.window, -torch.inf)
        worth = torch.nn.functional.pad(worth, (0, 1), value=torch.inf)
        best = worth.argsort(dim=2, descending=True, stable=True)[:, :, : self._spec.selected_pages]
        is_read = torch.zeros_like(worth, dtype=torch.bool).scatter(2, best, value=True)
        return seen & is_read.repeat_interleave(page, dim=2)[:, :, None, : self._seen_tokens]


def selecting_cache_factory(
    spec: KVCacheSpec, *, single_token: bool, module: torch.nn.Module | None = None
) -> Callable[[], Cache]:
    """Return what makes empty caches of which queries read what `told` says of a rewritten graph.

    `singles` and `module` are as in `Pass.in_torch`. Raises ModelError for what has no form in torch, or none without `module`.
    """
    check_supported(
        spec,
        is_complete=all(layer.page_size and layer.selected_pages and layer.page_score in _PAGE_SCORES for layer in spec.layers),
    )
    if not single_token:
        make: Callable[[], Cache] = DynamicCache
        return make
    expose_queries(module, len(spec.layers), "which keys are read depends on the queries")
    return lambda: Cache(layers=[SelectingLayer(layer) for layer in spec.layers])
