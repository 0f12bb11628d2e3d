"""The base of the passes that rewrite static caches: view the caches, check the options, rewrite as a transaction."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
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

    def valid_options(
        self, model: ir.Model, context: PassContext, candidates: Mapping[str, Sequence[Any]]
    ) -> dict[str, tuple[Any, ...]]:
        """Return the values among `candidates`, by field, that are valid for `model` with the other options as they are.

        Fields with fewer than two valid values are left out. Raises ModelError if the caches of `model` are not static.
        """
        from ryzen_compile.errors import ModelError
        from ryzen_compile.ir.patterns import PatternNotMatched
        from ryzen_passes.kv.static.cache_view import read_static_cache_view

        try:
            view = read_static_cache_view(model)
        except PatternNotMatched as error:
            raise ModelError(error.reason, hint=error.hint) from None

        def is_valid(field: str, value: Any) -> bool:
            try:
                candidate = dataclasses.replace(self, **{field: value})  # type: ignore[type-var]
                return not isinstance(candidate.configure(view, context), Refusal)
            except PatternNotMatched:
                return False

        valid = {field: tuple(value for value in values if is_valid(field, value)) for field, values in candidates.items()}
        return {field: values for field, values in valid.items() if len(values) > 1}

    def _configure(self, model: ir.Model, context: PassContext) -> tuple[StaticCacheView, Any] | Refusal:
        from ryzen_passes.kv.static.cache_view import read_static_cache_view

        view = read_static_cache_view(model)
        config = self.configure(view, context)
        return config if isinstance(config, Refusal) else (view, config)
