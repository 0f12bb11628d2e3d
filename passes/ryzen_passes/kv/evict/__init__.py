"""kv-evict: caches of a fixed token budget, in which a new token replaces the token of the lowest score."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ryzen_compile import registry
from ryzen_compile.backends.traits import find_traits
from ryzen_compile.errors import UsageError
from ryzen_compile.spec.options import member_option
from ryzen_compile.spec.passes import Change, PassContext, PassEstimate, Refusal
from ryzen_passes.kv import SCORES_GROUP
from ryzen_passes.kv.static_cache_pass import StaticCachePass

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    import torch

    from ryzen_compile.ir.edit.builder import ModelInfo
    from ryzen_compile.spec.kv_cache import KVCacheSpec
    from ryzen_passes.kv.evict.rewrite import EvictionConfig
    from ryzen_passes.kv.scoring.statistics import Statistics
    from ryzen_passes.kv.static.cache_view import StaticCacheView


@dataclass(frozen=True, kw_only=True)
class KvEvict(StaticCachePass):
    """Keep `budget` tokens per head and layer by score; never evict the first `sinks` and the latest `recent-window` tokens.

    Exact while a sequence is no longer than the budget. Keys keep their original positions. In a layer with an attention
    window, tokens behind the window leave first, sinks included; a layer whose budget covers its window is exact.
    """

    name: ClassVar[str] = "kv-evict"

    score: str = member_option(SCORES_GROUP, default="position")
    """The score by which tokens are kept."""
    budget: str = "50%"
    """Tokens that a head keeps, averaged over the layers: a number, a percentage of the capacity set by kv-static (`25%`), or
    the bytes of all states of a number of sequences (`2GB/8`)."""
    sinks: int = 4
    """Number of first tokens that are never evicted, at least 0."""
    recent_window: int = 64
    """Number of latest tokens that are never evicted, at least 1."""
    rescore_interval: int = 64
    """Number of single-token steps in which every slot is rescored once by a time-dependent score, at least 1; 0: never."""
    pyramid: float = 1.0
    """Ratio of the average number of tokens per layer to that of the last layer, at least 1; 1: all layers keep the same."""
    statistics: str = ""
    """Path of the file written by `calibrate`, for a calibrated score."""

    def estimate_view(self, view: StaticCacheView, config: EvictionConfig) -> PassEstimate:
        """Return the change in bytes of the states of one sequence, including the score and position states."""
        slots = [layer.slots if count is None else count for layer, count in zip(view.layers, config.slots, strict=True)]
        reason = f"{sum(slots) / len(slots):g} of {view.capacity} slots per head"
        return PassEstimate(state_bytes=-config.saved_bytes(view), reason=reason)

    def rewrite_view(
        self, view: StaticCacheView, model_info: ModelInfo, config: EvictionConfig, context: PassContext
    ) -> Change:
        """Rewrite in place."""
        from ryzen_passes.kv.evict.rewrite import evict

        caution = config.scorer.caution(view)
        change = evict(view, model_info, config, use_custom_op=find_traits(context.backend).supports_plugins)
        return change if caution is None else dataclasses.replace(change, warnings=(*change.warnings, caution))

    def calibrate(self, model: ir.Model, documents: Iterable[np.ndarray[Any, Any]], path: str | os.PathLike[str]) -> str:
        """Fit the statistics of the score to `model`, write them to `path`, and return a one-sentence summary of the fit.

        Raises UsageError if the score is not calibrated.
        """
        from ryzen_passes.kv.scoring.calibration import calibrate
        from ryzen_passes.kv.scoring.scorer import find_scorer

        if not find_scorer(self.score).is_calibrated():
            calibrated = [name for name in registry.names(SCORES_GROUP) if find_scorer(name).is_calibrated()]
            raise UsageError(
                f"the score `{self.score}` takes no statistics", hint=f"the calibrated scores are {', '.join(calibrated)}"
            )
        estimators = find_scorer(self.score).estimators
        return calibrate(model, self.score, estimators, documents, path, recent_window=self.recent_window)

    @classmethod
    def torch_cache_factory(
        cls, spec: KVCacheSpec, *, single_token: bool, module: torch.nn.Module | None = None, statistics: Sequence[Path] = ()
    ) -> Callable[[], Any] | None:
        """Return a factory of Transformers caches that keep the same slots; None if no layer evicts or caches are quantized."""
        from ryzen_compile.spec.kv_cache import Eviction

        if not spec.is_unquantized or not any(isinstance(layer.policy, Eviction) for layer in spec.layers):
            return None
        from ryzen_passes.kv.evict.torch_reference import evicting_cache_factory

        return evicting_cache_factory(spec, single_token=single_token, module=module, statistics=statistics)

    def search_space(self, model: ir.Model, context: PassContext) -> Mapping[str, Sequence[Any]]:
        """Return the scores that `model` supports, and budgets, with `rescore_interval` for a time-dependent score."""
        from ryzen_passes.kv.scoring.scorer import find_scorer

        candidates: dict[str, Sequence[Any]] = {
            "score": registry.names(SCORES_GROUP),
            "budget": ("12.5%", "25%", "37.5%", "50%", "75%"),
            "pyramid": (1.0, 2.0),
        }
        if find_scorer(self.score).time_dependent:
            candidates["rescore_interval"] = (16, 64, 256)
        return self.valid_options(model, context, candidates)

    def configure(self, view: StaticCacheView, context: PassContext) -> EvictionConfig | Refusal:
        """Return the eviction configuration for `view`, or the reason why the options do not apply to it."""
        from ryzen_passes.kv.budgets import BUDGET_HINT, parse_budget, pyramid_budgets
        from ryzen_passes.kv.evict.rewrite import EvictionConfig, evicting_slots, exact_ring_slots, state_bytes
        from ryzen_passes.kv.scoring.scorer import find_scorer
        from ryzen_passes.kv.scoring.statistics_option import reference
        from ryzen_passes.kv.static.cache_view import refuse_alibi

        if (refusal := refuse_alibi(view)) is not None:
            return refusal
        capacity = view.capacity
        slots = parse_budget(self.budget, capacity, functools.partial(state_bytes, view), ring_slots=exact_ring_slots(view))
        if slots is None:
            return Refusal(
                reason=f"`budget` must be a token count, a percentage or a memory size (got `{self.budget}`)",
                location="budget",
                hint=BUDGET_HINT,
            )
        refusal = self._check_options(slots, capacity)
        if refusal is not None:
            return refusal
        statistics = self._load_statistics(view)
        if isinstance(statistics, Refusal):
            return statistics
        return EvictionConfig(
            scorer=find_scorer(self.score),
            slots=tuple(
                evicting_slots(layer, budget)
                for layer, budget in zip(
                    view.layers,
                    pyramid_budgets(slots, len(view.layers), self.pyramid, self.sinks + self.recent_window, capacity),
                    strict=True,
                )
            ),
            sinks=self.sinks,
            recent_window=self.recent_window,
            rescore_interval=self.rescore_interval,
            statistics=statistics,
            statistics_ref=None if statistics is None else reference(self.statistics),
        )

    def _check_options(self, slots: int, capacity: int) -> Refusal | None:
        for option, value, minimum, hint in (
            ("sinks", self.sinks, 0, "set the number of first tokens that are never evicted: sinks=4"),
            ("recent-window", self.recent_window, 1, "the latest token is never evicted: recent-window=1 or more"),
            ("rescore-interval", self.rescore_interval, 0, "set it to 0 to disable rescoring"),
            ("pyramid", self.pyramid, 1, "set it to 1 to give every layer the same budget"),
        ):
            if value < minimum:
                return Refusal(reason=f"`{option}` must be at least {minimum} (got {value:g})", location=f"{option}", hint=hint)
        minimum_slots = self.sinks + self.recent_window
        if slots < minimum_slots:
            return Refusal(
                reason=f"`budget` of {slots} tokens is less than `sinks` {self.sinks} + `recent-window` {self.recent_window}",
                location="budget",
                hint=f"set `budget` to at least {minimum_slots} tokens, or lower `sinks` or `recent-window`",
            )
        if slots > capacity:
            return Refusal(
                reason=f"`budget` of {slots} tokens exceeds the capacity of {capacity} tokens",
                location="budget",
                hint=f"set `budget` to at most {capacity} tokens, or raise `capacity` of kv-static",
            )
        return None

    def _load_statistics(self, view: StaticCacheView) -> Statistics | Refusal | None:
        """Return the statistics of the score, None if it takes none, or the reason why it does not apply to `view`."""
        from ryzen_passes.kv.scoring.scorer import OTHER_SCORE_HINT, find_scorer
        from ryzen_passes.kv.scoring.statistics_option import load_statistics

        scorer = find_scorer(self.score)
        if problem := scorer.problem(view, None):
            return Refusal(reason=problem, location="score", hint=OTHER_SCORE_HINT)
        if not scorer.is_calibrated():
            return None
        hint = (
            f"run `ryzen-compile calibrate MODEL FILE --for 'kv-evict{{score={self.score}}}' --data TOKENS`, "
            "and set statistics=FILE"
        )
        if not self.statistics:
            return Refusal(
                reason=f"the score `{self.score}` takes statistics of the model, and `statistics` is not set",
                location="statistics",
                hint=hint,
            )
        statistics = load_statistics(self.statistics, self.score, view, hint=hint)
        if isinstance(statistics, Refusal):
            return statistics
        if problem := scorer.problem(view, statistics):
            return Refusal(reason=problem, location="statistics", hint=hint)
        return statistics
