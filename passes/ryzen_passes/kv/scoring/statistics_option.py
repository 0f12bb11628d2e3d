"""The option `statistics` of a pass: the file that `calibrate` wrote for its other options and its model."""

from __future__ import annotations

from pathlib import Path

from ryzen_compile.errors import ModelError
from ryzen_compile.spec.kv_cache import StatisticsRef
from ryzen_compile.spec.passes import Refusal
from ryzen_compile.utils.files import hash_file
from ryzen_passes.kv.scoring.statistics import Statistics, read_statistics, weights_digest
from ryzen_passes.kv.static.cache_view import StaticCacheView


def load_statistics(path: str, kind: str, view: StaticCacheView, *, hint: str) -> Statistics | Refusal:
    """Return the statistics in the file at `path`, or a refusal with `hint` if they are not of `kind` and of the model."""
    try:
        statistics = read_statistics(path)
    except ModelError as error:
        return Refusal(reason=str(error), location="statistics", hint=hint)
    if statistics.header.kind != kind:
        reason = f"`{path}` holds statistics of the kind `{statistics.header.kind}`, not `{kind}`"
        return Refusal(reason=reason, location="statistics", hint=hint)
    if statistics.header.layers != len(view.layers) or statistics.header.model_fingerprint != weights_digest(view.model):
        reason = f"`{path}` was fitted to another model: the weights differ"
        return Refusal(reason=reason, location="statistics", hint=hint)
    return statistics


def reference(path: str) -> StatisticsRef:
    """Return the reference to the statistics file at `path` that a cache specification records."""
    return StatisticsRef(file_name=Path(path).name, sha256=hash_file(Path(path), "sha256"))
