"""kv-evict: caches of a fixed budget, in which a new token takes the slot of the one least worth keeping."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from ryzen_compile.errors import UsageError
from ryzen_compile.spec.passes import Change, Pass, PassContext, PassEstimate, Refusal
from ryzen_compile.spec.properties import Property
from ryzen_passes.properties import KV_DENSE, KV_STATIC, KV_UNQUANTIZED

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    import torch

    from ryzen_compile.spec.kv_cache import KVCacheSpec
    from ryzen_passes.kv.evict.rewrite import EvictionConfig
    from ryzen_passes.kv.scorers.statistics import Statistics
    from ryzen_passes.kv.static.cache_view import StaticCacheView

ScorerName = Literal["knorm", "value-norm", "position", "keydiff", "kvzap", "triattention"]


@dataclass(frozen=True, kw_only=True)
class KvEvict(Pass):
    """Keep `budget` tokens a head and layer, by their scores; the first `sinks` and the latest `recent` are never evicted.

    As long as a sequence is no longer than the budget nothing is lost. Keys keep the positions that they were made at.
    """

    name: ClassVar[str] = "kv-evict"
    changes_interface: ClassVar[bool] = True
    requires: ClassVar[frozenset[Property]] = frozenset({KV_STATIC, KV_DENSE, KV_UNQUANTIZED})
    ensures: ClassVar[frozenset[Property]] = frozenset({KV_STATIC})
    invalidates: ClassVar[frozenset[Property]] = frozenset({KV_DENSE})

    score: ScorerName = "knorm"
    """What a token is worth keeping."""
    budget: str = "50%"
    """Tokens a head keeps, on average over the layers: a number, a share of the capacity that kv-static gave, `25%`, or the
    bytes of all states of so many sequences, `2GB/8`."""
    sinks: int = 4
    """How many of the first tokens stay: from 0."""
    recent_window: int = 64
    """How many of the latest tokens stay: from 1."""
    rescore_interval: int = 64
    """Within how many steps of one token a score that ages (keydiff, triattention) is told again: from 1; 0: never."""
    pyramid: float = 1.0
    """How many times as many tokens a layer keeps on average as the last one does: from 1, which gives each the same."""
    statistics: str = ""
    """The file that `calibrate` wrote, for a calibrated score (kvzap, triattention)."""

    def estimate(self, model: ir.Model, context: PassContext) -> PassEstimate:
        """Return the bytes of one sequence's states that are saved, scores and positions paid for."""
        from ryzen_passes.kv.static.cache_view import read_static_cache_view

        form = read_static_cache_view(model)
        if isinstance(form, str):
            return PassEstimate(reason=f"it would be refused: {form}")
        method = self._config(form)
        if isinstance(method, Refusal):
            return PassEstimate(reason=f"it would be refused: {method.reason}")
        mean = sum(method.slots) / len(method.slots)
        return PassEstimate(
            state_bytes=-method.saved_bytes(form), reason=f"{mean:g} of {form.layers[0].spec.slots} slots a head"
        )

    def rewrite(self, model: ir.Model, context: PassContext) -> Change | Refusal:
        """Rewrite in place."""
        from ryzen_compile.ir.edit.builder import ModelInfo
        from ryzen_passes.kv.evict.rewrite import evict
        from ryzen_passes.kv.static.cache_view import StaticCacheView, read_static_cache_view
        from ryzen_passes.kv.transaction import transaction

        form = read_static_cache_view(model)
        if isinstance(form, str):
            return Refusal(reason=form, location="the caches", hint="put kv-static{capacity=...} before it")
        method = self._config(form)
        if isinstance(method, Refusal):
            return method

        def do(copy: ir.Model) -> Change:
            found = read_static_cache_view(copy)
            assert isinstance(found, StaticCacheView)
            return evict(found, ModelInfo(copy), method, use_custom_op=context.backend == "tensorrt")

        return transaction(model, do)

    def calibrate(self, model: ir.Model, streams: Iterable[np.ndarray[Any, Any]], path: str | os.PathLike[str]) -> str:
        """Fit the statistics of the score to `model`, write them to `path`, and say in one sentence how well they fit."""
        from ryzen_passes.kv.scorers import SCORERS
        from ryzen_passes.kv.scorers.calibration import calibrate

        if not SCORERS[self.score].is_calibrated:
            raise UsageError(
                f"the score `{self.score}` takes no statistics", hint="kvzap and triattention do: kv-evict{score=kvzap}"
            )
        return calibrate(model, self.score, streams, path, self.recent_window)

    @classmethod
    def torch_reference(
        cls, spec: KVCacheSpec, *, single_token: bool, module: torch.nn.Module | None = None
    ) -> Callable[[], Any] | None:
        """Return what makes caches of the same slots; None where no layer evicts, or slots hold codes."""
        if not spec.is_unquantized or not any(layer.method in get_args(ScorerName) for layer in spec.layers):
            return None
        from ryzen_passes.kv.evict.torch_reference import evicting_cache_factory

        return evicting_cache_factory(spec, single_token=single_token, module=module)

    def _config(self, view: StaticCacheView) -> EvictionConfig | Refusal:
        """Return what is to be kept of `form`, or why that cannot be."""
        from ryzen_compile.spec.kv_cache import StatisticsRef
        from ryzen_compile.utils.files import hash_file
        from ryzen_passes.kv.evict.budgets import parse_budget, pyramid_budgets
        from ryzen_passes.kv.evict.rewrite import EvictionConfig, token_bytes
        from ryzen_passes.kv.static.cache_view import refuse_alibi

        if (refusal := refuse_alibi(view)) is not None:
            return refusal
        capacity = min(layer.spec.slots or 0 for layer in view.layers)
        slots = parse_budget(self.budget, capacity, token_bytes(view))
        if slots is None:
            hint = "write tokens, 1024, a share, 25%, or bytes for so many sequences, 2GB/8"
            return Refusal(reason=f"`{self.budget}` is no budget", location="budget", hint=hint)
        refusal = self._check_options(slots, capacity)
        if refusal is not None:
            return refusal
        statistics = self._load_statistics(view)
        if isinstance(statistics, Refusal):
            return statistics
        return EvictionConfig(
            score=self.score,
            slots=pyramid_budgets(slots, len(view.layers), self.pyramid, self.sinks + self.recent_window, capacity),
            sinks=self.sinks,
            recent_window=self.recent_window,
            rescore_interval=self.rescore_interval,
            statistics=statistics,
            statistics_ref=None
            if statistics is None
            else StatisticsRef(path=self.statistics, sha256=hash_file(Path(self.statistics), "sha256")),
        )

    def _check_options(self, slots: int, capacity: int) -> Refusal | None:
        if self.sinks < 0 or self.recent_window < 1:
            says = f"{self.sinks} sinks and {self.recent_window} recent tokens cannot be"
            return Refusal(
                reason=says, location="sinks, recent", hint="sinks are from 0, recent tokens from 1: the latest stays"
            )
        if self.rescore_interval < 0 or self.pyramid < 1:
            says = f"`every` {self.rescore_interval} and `pyramid` {self.pyramid:g} cannot be"
            return Refusal(reason=says, location="every, pyramid", hint="`every` is from 0, `pyramid` from 1")
        least = self.sinks + self.recent_window
        if slots < least:
            return Refusal(
                reason=f"a budget of {slots} tokens is less than {self.sinks} sinks and {self.recent_window} recent ones",
                location="budget",
                hint=f"give it at least {least}, or lower sinks or recent",
            )
        if slots > capacity:
            return Refusal(
                reason=f"a budget of {slots} tokens is more than the capacity of {capacity}", location="budget", hint="lower it"
            )
        return None

    def _load_statistics(self, view: StaticCacheView) -> Statistics | Refusal | None:
        """Return the statistics that the score takes, None where it takes none, or why it cannot be told here."""
        from ryzen_compile.errors import ModelError
        from ryzen_passes.kv.scorers import SCORERS
        from ryzen_passes.kv.scorers.statistics import fingerprint, read_statistics

        score = SCORERS[self.score]
        if problem := score.problem(view, None):
            return Refusal(reason=problem, location="score", hint="take another score: knorm")
        if not score.is_calibrated:
            return None
        again = f"ryzen-compile calibrate MODEL FILE --for 'kv-evict{{score={self.score}}}' --data TOKENS, and name FILE here"
        if not self.statistics:
            return Refusal(reason=f"the score {self.score} takes statistics of the model", location="statistics", hint=again)
        try:
            found = read_statistics(self.statistics)
        except ModelError as error:
            return Refusal(reason=str(error), location="statistics", hint=again)
        if found.header.score != self.score:
            says = f"`{self.statistics}` holds statistics for the score {found.header.score}"
            return Refusal(reason=says, location="statistics", hint=again)
        if found.header.layers != len(view.layers) or found.header.model_fingerprint != fingerprint(view.model):
            says = f"`{self.statistics}` was fitted to another model: its weights are others"
            return Refusal(reason=says, location="statistics", hint=again)
        if problem := score.problem(view, found):
            return Refusal(reason=problem, location="statistics", hint=again)
        return found
