"""The base of the passes that rewrite static caches: view the caches, check the options, rewrite as a transaction."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any, ClassVar

from ryzen_compile.spec.fidelity import Fidelity, Lossy
from ryzen_compile.spec.passes import Change, Pass, PassContext, PassEstimate, Refusal
from ryzen_compile.spec.properties import Property
from ryzen_passes.properties import KV_DENSE, KV_STATIC, KV_UNQUANTIZED

if TYPE_CHECKING:
    import onnx_ir as ir

    from ryzen_compile.ir.edit.builder import ModelInfo
    from ryzen_passes.kv.static.cache_view import StaticCacheView


class StaticCachePass(Pass):
    """A pass on a decoder with static caches, after kv-static.

    A subclass derives its configuration, of a type of its own, from the view and its options; `estimate` and `rewrite` refuse
    alike if there is none. The declared properties suit a pass that drops tokens, or reads only some of them.
    """

    changes_interface: ClassVar[bool] = True
    requires: ClassVar[frozenset[Property]] = frozenset({KV_STATIC, KV_DENSE, KV_UNQUANTIZED})
    ensures: ClassVar[frozenset[Property]] = frozenset({KV_STATIC})
    invalidates: ClassVar[frozenset[Property]] = frozenset({KV_DENSE})

    @property
    def fidelity(self) -> Fidelity:
        """Lossy by the perplexity, which `evaluate` measures; the criteria of the evaluation set the floor."""
        return Lossy("perplexity_ratio", None)

    @abc.abstractmethod
    def configure(self, view: StaticCacheView, context: PassContext) -> Any | Refusal:
        """Return the configuration of the rewrite for `view`, or the reason why the options do not apply to it.

        Raises PatternNotMatched, with the same meaning as a refusal.
        """

    @abc.abstractmethod
    def estimate_view(self, view: StaticCacheView, config: Any) -> PassEstimate:
        """Return the expected effect of the configuration on `view`."""

    @abc.abstractmethod
    def rewrite_view(self, view: StaticCacheView, model_info: ModelInfo, config: Any, context: PassContext) -> Change:
        """Rewrite the model of `view` in place. Raises PatternNotMatched if that is not possible."""

    def estimate(self, model: ir.Model, context: PassContext) -> PassEstimate | Refusal:
        """Return the change in bytes of the states of one sequence."""
        from ryzen_compile.ir.patterns import PatternNotMatched

        try:
            configured = self._configure(model, context)
        except PatternNotMatched as error:
            return error.to_refusal()
        return configured if isinstance(configured, Refusal) else self.estimate_view(*configured)

    def rewrite(self, model: ir.Model, context: PassContext) -> Change | Refusal:
        """Rewrite in place."""
        from ryzen_compile.ir.edit.builder import ModelInfo
        from ryzen_compile.ir.edit.transaction import transaction

        def rewrite_copy(copy: ir.Model) -> Change | Refusal:
            configured = self._configure(copy, context)
            if isinstance(configured, Refusal):
                return configured
            view, config = configured
            return self.rewrite_view(view, ModelInfo(copy), config, context)

        return transaction(model, rewrite_copy)

    def _configure(self, model: ir.Model, context: PassContext) -> tuple[StaticCacheView, Any] | Refusal:
        from ryzen_passes.kv.static.cache_view import read_static_cache_view

        view = read_static_cache_view(model)
        if isinstance(view, str):
            return Refusal(reason=view, location="caches", hint="add kv-static{capacity=...} before this pass")
        config = self.configure(view, context)
        return config if isinstance(config, Refusal) else (view, config)
