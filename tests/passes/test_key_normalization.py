"""Models that normalize their keys, and the warning of kv-evict that a score is known to fail on them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from support.decoders import ARCHITECTURES, export

from ryzen_compile.ir.load import load
from ryzen_compile.spec.passes import Change, PassContext
from ryzen_passes.kv.evict import KvEvict
from ryzen_passes.kv.recognition.key_normalization import are_keys_normalized
from ryzen_passes.kv.static import KvStatic
from ryzen_passes.kv.static.cache_view import read_static_cache_view

CONTEXT = PassContext(backend="onnxruntime")
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "kv_methods.json"


NORMALIZED = {"qwen3", "gemma3", "olmo2"}


@pytest.mark.parametrize("architecture", sorted({*ARCHITECTURES, "olmo2", "stablelm", "granite"} - {"bloom"}))
@pytest.mark.parametrize("style", ["optimum-sdpa", pytest.param("dynamo-21", marks=pytest.mark.exhaustive)])
def test_models_that_normalize_their_keys_are_recognized(architecture: str, style: str) -> None:
    model = load(export(architecture, style))
    assert isinstance(KvStatic(capacity=64).rewrite(model, CONTEXT), Change)
    keys = [layer.key.update for layer in read_static_cache_view(model).layers]
    assert [are_keys_normalized(key) for key in keys] == [architecture in NORMALIZED] * len(keys)


def test_a_score_that_is_known_to_fail_is_reported_with_what_was_measured() -> None:
    warnings = {}
    for architecture, score in itertools.product(("gemma3", "llama"), ("knorm", "position")):
        model = load(export(architecture, "optimum-sdpa"))
        for pass_ in (KvStatic(capacity=64), KvEvict(score=score, budget="12", sinks=2, recent_window=4)):
            outcome = pass_.rewrite(model, CONTEXT)
            assert isinstance(outcome, Change)
        warnings[architecture, score] = outcome.warnings
    (warning,) = warnings.pop(("gemma3", "knorm"))
    assert not any(warnings.values())
    cases = json.loads(RESULTS.read_text(encoding="utf-8"))["cases"]
    knorm, kvzap = cases["knorm.0.25"], cases["kvzap.0.25"]
    loss, answers = round(100 * (knorm["perplexity_ratio"][0] - 1)), round(knorm["retrieval"][0] * knorm["questions"])
    assert f"{loss} % of perplexity and answers {answers} of {knorm['questions']} questions" in warning
    loss, answers = round(100 * (kvzap["perplexity_ratio"][0] - 1)), round(kvzap["retrieval"][0] * kvzap["questions"])
    assert warning.endswith(f"(`kvzap`: {loss} %, {answers})")
