"""kv-select: caches that keep every token, of which a query reads the pages that could matter to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ryzen_compile.spec.passes import Change, Pass, PassContext, PassEstimate, Refusal
from ryzen_compile.spec.properties import Property
from ryzen_passes.properties import KV_DENSE, KV_STATIC, KV_UNQUANTIZED

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from ryzen_compile.spec.kv_cache import KVCacheSpec
    from ryzen_passes.kv.static.cache_view import StaticCacheView

_MAX_TOPK_TENSORRT = 3840
"""What TensorRT's TopK takes."""


@dataclass(frozen=True, kw_only=True)
class KvSelect(Pass):
    """Let a step of one token read `keep` pages of `page` tokens a head: those that score highest, its own among them.

    Nothing is evicted: the next query chooses anew. As long as a sequence is no longer than these pages nothing is lost. Each
    kv-head chooses for itself, for all queries that share it. A step of several tokens reads everything.
    """

    name: ClassVar[str] = "kv-select"
    changes_interface: ClassVar[bool] = True
    requires: ClassVar[frozenset[Property]] = frozenset({KV_STATIC, KV_DENSE, KV_UNQUANTIZED})
    ensures: ClassVar[frozenset[Property]] = frozenset({KV_STATIC})
    invalidates: ClassVar[frozenset[Property]] = frozenset({KV_DENSE})

    score: Literal["bound", "cosine"] = "bound"
    """`bound`: Quest's bound of the products with any key of a page, arXiv 2406.10774, of two rows a page. `cosine`: with the
    mean direction of its keys, of one row a page; it bounds nothing."""
    page_size: int = 16
    """Tokens a page: at least 1, a divisor of the capacity."""
    selected_pages: int = 0
    """Pages that a query reads: at least 1, the one that its token lies in."""

    def estimate(self, model: ir.Model, context: PassContext) -> PassEstimate:
        """Return the bytes of one sequence's states that are gained: what is told of the pages."""
        from ryzen_passes.kv.select.rewrite import PAGE_SCORES
        from ryzen_passes.kv.static.cache_view import read_static_cache_view

        form = read_static_cache_view(model)
        if isinstance(form, str):
            return PassEstimate(reason=f"it would be refused: {form}")
        refusal = self._refusal(form, context)
        if refusal is not None:
            return PassEstimate(reason=f"it would be refused: {refusal.reason}")
        gained = copied = 0
        for layer in form.layers:
            key, value = (
                layer.spec.kv_heads * side.spec.head_size * _element_bytes(side.past) for side in (layer.key, layer.value)
            )
            gained += len(PAGE_SCORES[self.score][1]) * key * ((layer.spec.slots or 0) // self.page_size)
            copied += (key + value) * self.page_size * self.selected_pages
        why = f"{copied} bytes of keys and values are read and copied a token"
        return PassEstimate(
            state_bytes=gained,
            reason=f"{why}, of {(form.layers[0].spec.slots or 0) // self.page_size} pages {self.selected_pages}",
        )

    def rewrite(self, model: ir.Model, context: PassContext) -> Change | Refusal:
        """Rewrite in place."""
        from ryzen_compile.ir.edit.builder import ModelInfo
        from ryzen_passes.kv.select.rewrite import select
        from ryzen_passes.kv.static.cache_view import StaticCacheView, read_static_cache_view
        from ryzen_passes.kv.transaction import transaction

        form = read_static_cache_view(model)
        if isinstance(form, str):
            return Refusal(reason=form, location="the caches", hint="put kv-static{capacity=...} before it")
        refusal = self._refusal(form, context)
        if refusal is not None:
            return refusal

        def do(copy: ir.Model) -> Change:
            found = read_static_cache_view(copy)
            assert isinstance(found, StaticCacheView)
            return select(
                found, ModelInfo(copy), score=self.score, page_size=self.page_size, selected_pages=self.selected_pages
            )

        return transaction(model, do)

    @classmethod
    def torch_reference(
        cls, spec: KVCacheSpec, *, single_token: bool, module: torch.nn.Module | None = None
    ) -> Callable[[], Any] | None:
        """Return what makes caches of which a single query reads the same pages; None where a query reads all."""
        from ryzen_passes.kv.select.rewrite import METHOD

        if all(layer.method != METHOD for layer in spec.layers):
            return None
        from ryzen_passes.kv.select.torch_reference import selecting_cache_factory

        return selecting_cache_factory(spec, single_token=single_token, module=module)

    def _refusal(self, view: StaticCacheView, context: PassContext) -> Refusal | None:
        from ryzen_passes.kv.static.cache_view import refuse_alibi

        if (refusal := refuse_alibi(view)) is not None:
            return refusal
        capacity = min(layer.spec.slots or 0 for layer in view.layers)
        pages = capacity // self.page_size if self.page_size > 0 else 0
        if self.page_size < 1 or self.selected_pages < 1:
            says = f"{self.selected_pages} pages of {self.page_size} tokens cannot be"
            return Refusal(
                reason=says,
                location="page, keep",
                hint="say how many pages a query reads: kv-select{page-size=16,selected-pages=64}",
            )
        if any((layer.spec.slots or 0) % self.page_size for layer in view.layers):
            says = f"a capacity of {capacity} tokens is not of whole pages of {self.page_size}"
            return Refusal(reason=says, location="page", hint=f"kv-static{{capacity={max(pages, 1) * self.page_size}}}")
        if self.selected_pages > pages:
            says = f"{self.selected_pages} pages of {self.page_size} tokens are more than the capacity of {capacity}"
            return Refusal(reason=says, location="keep", hint=f"{pages} pages are all that there are")
        if context.backend.startswith("tensorrt") and self.selected_pages > _MAX_TOPK_TENSORRT:
            says = f"TensorRT chooses {_MAX_TOPK_TENSORRT} pages at most, not {self.selected_pages}"
            return Refusal(reason=says, location="keep", hint="make pages larger")
        return None


def _element_bytes(value: ir.Value) -> int:
    return int(value.dtype.numpy().itemsize) if value.dtype is not None else 4
