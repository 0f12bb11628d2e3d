"""KV passes without quantization are exact over 256 steps as long as no token is evicted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.decoders import BATCH_ONE_ONLY, CASES, DEFAULT_CASES, EXPORT_FAILURES, VOCABULARY, export, torch_steps
from support.step_runner import StepRunner

from ryzen_compile.ir.load import load
from ryzen_compile.spec.passes import Change, Pass, PassContext, Refusal
from ryzen_passes.attention import Attention
from ryzen_passes.kv.compact import KvCompact
from ryzen_passes.kv.evict import KvEvict
from ryzen_passes.kv.select import KvSelect
from ryzen_passes.kv.static import KvStatic
from ryzen_passes.kv.window import KvWindow

STEPS = 256
STACKS: dict[str, tuple[Pass, ...]] = {
    "static": (),
    "static, decomposed": (Attention(),),
    "evict": (KvEvict(score="keydiff", budget=str(STEPS), rescore_interval=16),),
    "evict, pyramid": (KvEvict(score="value-norm", budget=str(3 * STEPS // 2), pyramid=1.5),),
    "window": (KvWindow(sinks=4, window=STEPS - 4),),
    "select": (KvSelect(page_size=16, selected_pages=STEPS // 16),),
    "compact": (KvCompact(budget=str(STEPS), window=16, append_slots=16),),
}
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gpt2", "falcon", "bloom")
REFUSED = {
    ("gpt2", "window"): "by a rotation",
    **{("bloom", stack): "ALiBi" for stack in ("evict", "evict, pyramid", "window", "select", "compact")},
}
"""(architecture, passes) that are refused -> part of the reason."""


def cases() -> list[Any]:
    """Return all combinations; by default one style per architecture runs with `static`, and llama with all passes."""
    params = []
    for architecture, style in CASES:
        if architecture in ARCHITECTURES and (architecture, style) not in {**EXPORT_FAILURES, **BATCH_ONE_ONLY}:
            for stack in STACKS:
                is_default = style == "optimum-sdpa" and (architecture == "llama" or stack == "static")
                marks = () if is_default and (architecture, style) in DEFAULT_CASES else (pytest.mark.exports,)
                params.append(pytest.param(architecture, style, stack, marks=marks))
    return params


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "style", "stack"), cases())
def test_256_steps_are_exact(architecture: str, style: str, stack: str) -> None:
    model = load(export(architecture, style))
    capacity = STEPS if stack in ("static", "static, decomposed", "evict", "window", "select") else 2 * STEPS
    for pass_ in (KvStatic(capacity=capacity, step=1), *STACKS[stack]):
        outcome = pass_.rewrite(model, PassContext(backend="onnxruntime"))
        if isinstance(outcome, Refusal):
            assert REFUSED.get((architecture, stack), "nothing to refuse") in outcome.reason
            return
        assert isinstance(outcome, Change), outcome
    assert (architecture, stack) not in REFUSED
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (2, STEPS))
    stepper = StepRunner(model, 2)
    logits = np.concatenate([stepper.step(ids[:, step : step + 1])["logits"] for step in range(STEPS)], axis=1)
    np.testing.assert_allclose(logits, torch_steps(architecture, ids, [STEPS]), rtol=0, atol=1e-4)
