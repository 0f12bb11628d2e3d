"""kv-select: caches that keep every token, of which a query reads the pages that could matter to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ryzen_compile.spec.passes import Change, Context, Estimate, Pass, Refusal
from ryzen_compile.spec.properties import Fact
from ryzen_passes.properties import KV_DENSE, KV_EXACT, KV_FIXED

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from ryzen_compile.spec.kv_cache import CacheMap
    from ryzen_passes.kv.static.cache_view import FixedForm

_MOST_ON_TENSORRT = 3840
"""What TensorRT's TopK takes."""


@dataclass(frozen=True, kw_only=True)
class KvSelect(Pass):
    """Let a step of one token read `keep` pages of `page` tokens a head: those that score highest, its own among them.

    Nothing is evicted: the next query chooses anew. As long as a sequence is no longer than these pages nothing is lost. Each
    kv-head chooses for itself, for all queries that share it. A step of several tokens reads everything.
    """

    name: ClassVar[str] = "kv-select"
    changes_interface: ClassVar[bool] = True
    requires: ClassVar[frozenset[Fact]] = frozenset({KV_FIXED, KV_DENSE, KV_EXACT})
    ensures: ClassVar[frozenset[Fact]] = frozenset({KV_FIXED})
    breaks: ClassVar[frozenset[Fact]] = frozenset({KV_DENSE})

    score: Literal["bound", "cosine"] = "bound"
    """`bound`: Quest's bound of the products with any key of a page, arXiv 2406.10774, of two rows a page. `cosine`: with the
    mean direction of its keys, of one row a page; it bounds nothing."""
    page: int = 16
    """Tokens a page: at least 1, a divisor of the capacity."""
    keep: int = 0
    """Pages that a query reads: at least 1, the one that its token lies in."""

    def estimate(self, model: ir.Model, context: Context) -> Estimate:
        """Return the bytes of one sequence's states that are gained: what is told of the pages."""
        from ryzen_passes.kv.select.rewrite import SCORES
        from ryzen_passes.kv.static.cache_view import read_fixed

        form = read_fixed(model)
        if isinstance(form, str):
            return Estimate(why=f"it would be refused: {form}")
        refusal = self._refusal(form, context)
        if refusal is not None:
            return Estimate(why=f"it would be refused: {refusal.says}")
        gained = copied = 0
        for layer in form.layers:
            key, value = (layer.told.kv_heads * side.told.size * _bytes(side.past) for side in (layer.key, layer.value))
            gained += len(SCORES[self.score][1]) * key * ((layer.told.slots or 0) // self.page)
            copied += (key + value) * self.page * self.keep
        why = f"{copied} bytes of keys and values are read and copied a token"
        return Estimate(state_bytes=gained, why=f"{why}, of {(form.layers[0].told.slots or 0) // self.page} pages {self.keep}")

    def rewrite(self, model: ir.Model, context: Context) -> Change | Refusal:
        """Rewrite in place."""
        from ryzen_compile.ir.edit.builder import Known
        from ryzen_passes.kv.select.rewrite import select
        from ryzen_passes.kv.static.cache_view import FixedForm, read_fixed
        from ryzen_passes.kv.transaction import attempt

        form = read_fixed(model)
        if isinstance(form, str):
            return Refusal(says=form, where="the caches", hint="put kv-static{capacity=...} before it")
        refusal = self._refusal(form, context)
        if refusal is not None:
            return refusal

        def do(copy: ir.Model) -> Change:
            found = read_fixed(copy)
            assert isinstance(found, FixedForm)
            return select(found, Known(copy), score=self.score, page=self.page, keep=self.keep)

        return attempt(model, do)

    @classmethod
    def in_torch(cls, told: CacheMap, *, singles: bool, module: torch.nn.Module | None = None) -> Callable[[], Any] | None:
        """Return what makes caches of which a single query reads the same pages; None where a query reads all."""
        from ryzen_passes.kv.select.rewrite import METHOD

        if all(layer.method != METHOD for layer in told.layers):
            return None
        from ryzen_passes.kv.select.torch_reference import selecting

        return selecting(told, singles=singles, module=module)

    def _refusal(self, form: FixedForm, context: Context) -> Refusal | None:
        from ryzen_passes.kv.static.cache_view import biased

        if (refusal := biased(form)) is not None:
            return refusal
        capacity = min(layer.told.slots or 0 for layer in form.layers)
        pages = capacity // self.page if self.page > 0 else 0
        if self.page < 1 or self.keep < 1:
            says = f"{self.keep} pages of {self.page} tokens cannot be"
            return Refusal(says=says, where="page, keep", hint="say how many pages a query reads: kv-select{page=16,keep=64}")
        if any((layer.told.slots or 0) % self.page for layer in form.layers):
            says = f"a capacity of {capacity} tokens is not of whole pages of {self.page}"
            return Refusal(says=says, where="page", hint=f"kv-static{{capacity={max(pages, 1) * self.page}}}")
        if self.keep > pages:
            says = f"{self.keep} pages of {self.page} tokens are more than the capacity of {capacity}"
            return Refusal(says=says, where="keep", hint=f"{pages} pages are all that there are")
        if context.backend.startswith("tensorrt") and self.keep > _MOST_ON_TENSORRT:
            says = f"TensorRT chooses {_MOST_ON_TENSORRT} pages at most, not {self.keep}"
            return Refusal(says=says, where="keep", hint="make pages larger")
        return None


def _bytes(value: ir.Value) -> int:
    return int(value.dtype.numpy().itemsize) if value.dtype is not None else 4
