"""KV passes without quantization are exact over 256 steps as long as no token is evicted."""

from __future__ import annotations

import numpy as np
import pytest
from support.decoder_matrix import BATCH_ONE_ONLY, EXPORT_FAILURES, STACK_REFUSALS, STACKS, STEP_STACKS, STEPS, cells
from support.decoders import VOCABULARY, export, torch_steps
from support.step_runner import StepRunner

from ryzen_compile.ir.load import load
from ryzen_compile.spec.passes import Change, PassContext, Refusal


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "style", "stack"), cells(*STEP_STACKS, without={**EXPORT_FAILURES, **BATCH_ONE_ONLY}))
def test_256_steps_are_exact(architecture: str, style: str, stack: str) -> None:
    model = load(export(architecture, style))
    for pass_ in STACKS[stack]:
        outcome = pass_.rewrite(model, PassContext(backend="onnxruntime"))
        if isinstance(outcome, Refusal):
            assert STACK_REFUSALS.get((architecture, stack), "nothing to refuse") in outcome.reason
            return
        assert isinstance(outcome, Change), outcome
    assert (architecture, stack) not in STACK_REFUSALS
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (2, STEPS))
    stepper = StepRunner(model, 2)
    logits = stepper.logits(ids, [1] * STEPS)
    np.testing.assert_allclose(logits, torch_steps(architecture, ids, [STEPS]), rtol=0, atol=1e-4)
