"""kv-evict: caches of a fixed budget, in which a new token takes the slot of the one least worth keeping."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from ryzen_compile.errors import UsageError
from ryzen_compile.spec.passes import Change, Context, Estimate, Pass, Refusal
from ryzen_compile.spec.properties import Fact
from ryzen_passes.properties import KV_DENSE, KV_EXACT, KV_FIXED

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    import torch

    from ryzen_compile.spec.kv_cache import CacheMap
    from ryzen_passes.kv.evict.rewrite import Method
    from ryzen_passes.kv.scorers.statistics import Statistics
    from ryzen_passes.kv.static.cache_view import FixedForm

Score = Literal["knorm", "value-norm", "position", "keydiff", "kvzap", "triattention"]


@dataclass(frozen=True, kw_only=True)
class KvEvict(Pass):
    """Keep `budget` tokens a head and layer, by their scores; the first `sinks` and the latest `recent` are never evicted.

    As long as a sequence is no longer than the budget nothing is lost. Keys keep the positions that they were made at.
    """

    name: ClassVar[str] = "kv-evict"
    changes_interface: ClassVar[bool] = True
    requires: ClassVar[frozenset[Fact]] = frozenset({KV_FIXED, KV_DENSE, KV_EXACT})
    ensures: ClassVar[frozenset[Fact]] = frozenset({KV_FIXED})
    breaks: ClassVar[frozenset[Fact]] = frozenset({KV_DENSE})

    score: Score = "knorm"
    """What a token is worth keeping."""
    budget: str = "50%"
    """Tokens a head keeps, on average over the layers: a number, a share of the capacity that kv-static gave, `25%`, or the
    bytes of all states of so many sequences, `2GB/8`."""
    sinks: int = 4
    """How many of the first tokens stay: from 0."""
    recent: int = 64
    """How many of the latest tokens stay: from 1."""
    every: int = 64
    """Within how many steps of one token a score that ages (keydiff, triattention) is told again: from 1; 0: never."""
    pyramid: float = 1.0
    """How many times as many tokens a layer keeps on average as the last one does: from 1, which gives each the same."""
    statistics: str = ""
    """The file that `calibrate` wrote, for a calibrated score (kvzap, triattention)."""

    def estimate(self, model: ir.Model, context: Context) -> Estimate:
        """Return the bytes of one sequence's states that are saved, scores and positions paid for."""
        from ryzen_passes.kv.static.cache_view import read_fixed

        form = read_fixed(model)
        if isinstance(form, str):
            return Estimate(why=f"it would be refused: {form}")
        method = self._method(form)
        if isinstance(method, Refusal):
            return Estimate(why=f"it would be refused: {method.says}")
        mean = sum(method.slots) / len(method.slots)
        return Estimate(state_bytes=-method.saves(form), why=f"{mean:g} of {form.layers[0].told.slots} slots a head")

    def rewrite(self, model: ir.Model, context: Context) -> Change | Refusal:
        """Rewrite in place."""
        from ryzen_compile.ir.edit.builder import Known
        from ryzen_passes.kv.evict.rewrite import evict
        from ryzen_passes.kv.static.cache_view import FixedForm, read_fixed
        from ryzen_passes.kv.transaction import attempt

        form = read_fixed(model)
        if isinstance(form, str):
            return Refusal(says=form, where="the caches", hint="put kv-static{capacity=...} before it")
        method = self._method(form)
        if isinstance(method, Refusal):
            return method

        def do(copy: ir.Model) -> Change:
            found = read_fixed(copy)
            assert isinstance(found, FixedForm)
            return evict(found, Known(copy), method, as_op=context.backend == "tensorrt")

        return attempt(model, do)

    def calibrate(self, model: ir.Model, streams: Iterable[np.ndarray[Any, Any]], path: str | os.PathLike[str]) -> str:
        """Fit the statistics of the score to `model`, write them to `path`, and say in one sentence how well they fit."""
        from ryzen_passes.kv.scorers import SCORES
        from ryzen_passes.kv.scorers.calibration import calibrate

        if not SCORES[self.score].is_calibrated:
            raise UsageError(
                f"the score `{self.score}` takes no statistics", hint="kvzap and triattention do: kv-evict{score=kvzap}"
            )
        return calibrate(model, self.score, streams, path, self.recent)

    @classmethod
    def in_torch(cls, told: CacheMap, *, singles: bool, module: torch.nn.Module | None = None) -> Callable[[], Any] | None:
        """Return what makes caches of the same slots; None where no layer evicts, or slots hold codes."""
        if not told.is_exact or not any(layer.method in get_args(Score) for layer in told.layers):
            return None
        from ryzen_passes.kv.evict.torch_reference import evicting

        return evicting(told, singles=singles, module=module)

    def _method(self, form: FixedForm) -> Method | Refusal:
        """Return what is to be kept of `form`, or why that cannot be."""
        from ryzen_compile.spec.kv_cache import Fitted
        from ryzen_compile.utils.files import hash_file
        from ryzen_passes.kv.evict.budgets import pyramid, slots_of
        from ryzen_passes.kv.evict.rewrite import Method, token_bytes
        from ryzen_passes.kv.static.cache_view import biased

        if (refusal := biased(form)) is not None:
            return refusal
        capacity = min(layer.told.slots or 0 for layer in form.layers)
        slots = slots_of(self.budget, capacity, token_bytes(form))
        if slots is None:
            hint = "write tokens, 1024, a share, 25%, or bytes for so many sequences, 2GB/8"
            return Refusal(says=f"`{self.budget}` is no budget", where="budget", hint=hint)
        refusal = self._out_of_range(slots, capacity)
        if refusal is not None:
            return refusal
        statistics = self._statistics(form)
        if isinstance(statistics, Refusal):
            return statistics
        return Method(
            score=self.score,
            slots=pyramid(slots, len(form.layers), self.pyramid, self.sinks + self.recent, capacity),
            sinks=self.sinks,
            recent=self.recent,
            every=self.every,
            statistics=statistics,
            fitted=None
            if statistics is None
            else Fitted(path=self.statistics, sha256=hash_file(Path(self.statistics), "sha256")),
        )

    def _out_of_range(self, slots: int, capacity: int) -> Refusal | None:
        if self.sinks < 0 or self.recent < 1:
            says = f"{self.sinks} sinks and {self.recent} recent tokens cannot be"
            return Refusal(says=says, where="sinks, recent", hint="sinks are from 0, recent tokens from 1: the latest stays")
        if self.every < 0 or self.pyramid < 1:
            says = f"`every` {self.every} and `pyramid` {self.pyramid:g} cannot be"
            return Refusal(says=says, where="every, pyramid", hint="`every` is from 0, `pyramid` from 1")
        least = self.sinks + self.recent
        if slots < least:
            return Refusal(
                says=f"a budget of {slots} tokens is less than {self.sinks} sinks and {self.recent} recent ones",
                where="budget",
                hint=f"give it at least {least}, or lower sinks or recent",
            )
        if slots > capacity:
            return Refusal(
                says=f"a budget of {slots} tokens is more than the capacity of {capacity}", where="budget", hint="lower it"
            )
        return None

    def _statistics(self, form: FixedForm) -> Statistics | Refusal | None:
        """Return the statistics that the score takes, None where it takes none, or why it cannot be told here."""
        from ryzen_compile.errors import ModelError
        from ryzen_passes.kv.scorers import SCORES
        from ryzen_passes.kv.scorers.statistics import fingerprint, read

        score = SCORES[self.score]
        if problem := score.problem(form, None):
            return Refusal(says=problem, where="score", hint="take another score: knorm")
        if not score.is_calibrated:
            return None
        again = f"ryzen-compile calibrate MODEL FILE --for 'kv-evict{{score={self.score}}}' --data TOKENS, and name FILE here"
        if not self.statistics:
            return Refusal(says=f"the score {self.score} takes statistics of the model", where="statistics", hint=again)
        try:
            found = read(self.statistics)
        except ModelError as error:
            return Refusal(says=str(error), where="statistics", hint=again)
        if found.told.score != self.score:
            says = f"`{self.statistics}` holds statistics for the score {found.told.score}"
            return Refusal(says=says, where="statistics", hint=again)
        if found.told.layers != len(form.layers) or found.told.model != fingerprint(form.model):
            says = f"`{self.statistics}` was fitted to another model: its weights are others"
            return Refusal(says=says, where="statistics", hint=again)
        if problem := score.problem(form, found):
            return Refusal(says=problem, where="statistics", hint=again)
        return found
