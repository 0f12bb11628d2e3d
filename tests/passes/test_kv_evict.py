"""kv-evict: states equal a slow reference slot by slot, and the rewrite is exact within the budget."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support.decoders import MAX_POSITIONS, VOCABULARY, WINDOW, export, torch_steps
from support.examples import examples
from support.kv_oracle import FLOAT32_MAX, HeadOracle
from support.rewritten_decoders import cache_spec, instrumented, rewritten
from support.step_runner import StepRunner, check_state_binding, state_bytes

from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.ir.load import load
from ryzen_compile.spec.passes import PassContext, Refusal
from ryzen_passes.attention import Attention
from ryzen_passes.kv.evict import KvEvict
from ryzen_passes.kv.static import KvStatic
from ryzen_passes.properties import KV_DENSE, KV_STATIC

Array = np.ndarray[Any, Any]
STYLE = "optimum-sdpa"


SCORES = {
    "knorm": lambda key, value, position, anchor: -np.sqrt(np.float32((key.astype(np.float64) ** 2).sum())),
    "value-norm": lambda key, value, position, anchor: np.sqrt(np.float32((value.astype(np.float64) ** 2).sum())),
    "position": lambda key, value, position, anchor: float(position),
    "keydiff": lambda key, value, position, anchor: -float(unit(key) @ unit(anchor)),
}


FORMS = ((0, "onnxruntime"), (1, "onnxruntime"), (1, "tensorrt"))
"""Tokens per step (0: any number) and backend."""
SIZES = ((0, 1, 3), (2, 3, 1), (4, 2, 0))
"""Sinks, recent window, and further slots per head."""
CASES = (
    *((score, 0, 1.0, form, size) for score, size in zip(SCORES, itertools.cycle(SIZES), strict=False) for form in FORMS),
    *(("keydiff", rescore_interval, 1.0, form, SIZES[0]) for rescore_interval in (1, 3) for form in FORMS),
    *(("keydiff", 2, 2.0, form, SIZES[1]) for form in FORMS),
)
ARCHITECTURES = ("llama", "gemma3, short window")
"""The second has layers with and without an attention window, in which the budgets are above and below the window."""


def unit(vector: Array) -> Array:
    vector64 = vector.astype(np.float64)
    return vector64 / np.linalg.norm(vector64)


@settings(
    max_examples=examples(20), deadline=None, report_multiple_bugs=False, phases=(Phase.explicit, Phase.reuse, Phase.generate)
)
@given(data=st.data())
def test_every_slot_equals_the_reference(data: st.DataObject) -> None:
    score, rescore_interval, pyramid, (step, backend), (sinks, recent_window, extra) = data.draw(st.sampled_from(CASES))
    evict = KvEvict(
        score=score,  # type: ignore[arg-type]
        budget=str(sinks + recent_window + extra),
        sinks=sinks,
        recent_window=recent_window,
        rescore_interval=rescore_interval,
        pyramid=pyramid,
    )
    architecture, static = data.draw(st.sampled_from(ARCHITECTURES)), KvStatic(capacity=64, step=step, ring_buffers=False)
    model, interface, spec, _ = instrumented(architecture, static, evict, backend=backend, rescored=True)
    batch = data.draw(st.integers(1, 3))
    runner = StepRunner(model, batch, interface)
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    oracles = {
        (layer, row, head): HeadOracle(spec.layers[layer].policy.slots, sinks, recent_window, spec.layers[layer].window)
        for layer in range(len(spec.layers))
        for row in range(batch)
        for head in range(spec.layers[layer].kv_heads)
    }
    anchors = {own: np.zeros(spec.layers[0].key.head_size) for own in oracles}
    seen = np.zeros(batch, int)
    for _ in range(data.draw(st.integers(1, 14))):
        step_size = step or data.draw(st.integers(1, 6))
        counts = np.array([data.draw(st.integers(0, step_size)) for _ in range(batch)])
        mask = (np.arange(step_size) < counts[:, None]).astype(np.int64)
        before = {name: value.copy() for name, value in runner.states.items()}
        outputs = runner.step(random.integers(0, VOCABULARY, (batch, step_size)), mask)
        states = {state.name: outputs[state.output] for state in runner.interface.states}
        first_rows: dict[str, int] = {}
        for index, layer in enumerate(spec.layers):
            keys, values = outputs[layer.key.update], outputs[layer.value.update]
            first_row = first_rows.get(layer.policy.score_state, 0)
            first_rows[layer.policy.score_state] = first_row + layer.kv_heads
            for row in range(batch):
                for head in range(layer.kv_heads):
                    oracle, state_row = oracles[index, row, head], (row, first_row + head)
                    positions, scores = (
                        states[layer.policy.position_state][state_row],
                        states[layer.policy.score_state][state_row],
                    )
                    stored_scores = {int(p): float(s) for p, s in zip(positions, scores, strict=True)}
                    if layer.policy.rescore_interval and counts[row]:
                        rows = -(-oracle.slots // layer.policy.rescore_interval) if step else oracle.slots
                        for slot in (int(seen[row]) * rows + np.arange(rows)) % oracle.slots if step else range(rows):
                            if (token := oracle.entries[slot]) is not None:
                                new_score = float(outputs[f"{layer.policy.score_state}_rescored"][state_row][slot])
                                expected = SCORES[score](*token[2:], token[0], anchors[index, row, head])
                                np.testing.assert_allclose(new_score, expected, rtol=0, atol=1e-5)
                                oracle.entries[slot] = (token[0], new_score, *token[2:])
                    new_tokens = [(int(seen[row]) + n, keys[row, head, n], values[row, head, n]) for n in range(counts[row])]
                    for _, key, _ in new_tokens:
                        anchors[index, row, head] += unit(key)
                    anchor = anchors[index, row, head]
                    scored_tokens = [(p, SCORES[score](key, value, p, anchor), key, value) for p, key, value in new_tokens]
                    # Ties are decided by the scores as rounded in the graph.
                    oracle.append([(p, stored_scores.get(p, float(s)), key, value) for p, s, key, value in scored_tokens])
                    for position, expected, _, _ in scored_tokens:
                        if position in stored_scores:
                            np.testing.assert_allclose(stored_scores[position], expected, rtol=1e-5, atol=1e-5)
                    assert positions.tolist() == oracle.positions()
                    for slot, token in enumerate(oracle.entries):
                        if token is not None:
                            assert scores[slot] == np.float32(token[1])
                            assert np.array_equal(states[layer.key.state or ""][row, head, slot], token[2])
                            assert np.array_equal(states[layer.value.state or ""][row, head, slot], token[3])
        for row in np.flatnonzero(counts == 0):
            for state in runner.interface.states:
                assert np.array_equal(runner.states[state.input][row], before[state.input][row]), state.name
        seen += counts
        assert runner.states["past_length"].tolist() == seen.tolist()


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2", "falcon"])
@pytest.mark.parametrize("step", [0, 1])
def test_exact_within_the_budget(architecture: str, step: int) -> None:
    model = rewritten(
        architecture,
        KvStatic(capacity=80, step=step),
        KvEvict(score="knorm", budget="50%", sinks=2, recent_window=8),
        Attention(),
    )
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (2, 40))
    chunks = [1] * 40 if step else [7, 1, 12, *[1] * 20]
    logits = StepRunner(model, 2).logits(ids, chunks)
    np.testing.assert_allclose(logits, torch_steps(architecture, ids, chunks), atol=1e-4)


FORM_IDS = ["chunks", "single-tokens", "tensorrt"]


@pytest.mark.parametrize(("step", "backend"), FORMS, ids=FORM_IDS)
@pytest.mark.parametrize("score", ["knorm", "keydiff"])
def test_a_layer_whose_budget_covers_its_window_loses_nothing(score: str, step: int, backend: str) -> None:
    evict = KvEvict(score=score, budget=str(WINDOW + 6), sinks=2, recent_window=8)  # type: ignore[arg-type]
    model = rewritten("mistral", KvStatic(capacity=256, step=step, ring_buffers=False), evict, backend=backend)
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (2, 120))
    chunks = [1] * 120 if step else [7, 1, 12, 40, 1, 1, 50, *[1] * 8]
    logits = StepRunner(model, 2).logits(ids, chunks)
    np.testing.assert_allclose(logits, torch_steps("mistral", ids, chunks), atol=1e-4)


@pytest.mark.parametrize(("step", "backend"), FORMS, ids=FORM_IDS)
def test_a_layer_without_a_window_keeps_its_budget_beside_layers_with_one(step: int, backend: str) -> None:
    evict = KvEvict(score="knorm", budget="70", sinks=2, recent_window=8)
    model = rewritten("gemma3", KvStatic(capacity=256, step=step), evict, backend=backend)
    assert [(layer.window, layer.policy.slots) for layer in cache_spec(model).layers] == [(WINDOW, WINDOW), (None, 70)]
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (2, 70))
    chunks = [1] * 70 if step else [7, 1, 12, 30, 1, 1, 10, *[1] * 8]
    logits = StepRunner(model, 2).logits(ids, chunks)
    np.testing.assert_allclose(logits, torch_steps("gemma3", ids, chunks), atol=1e-4)


def test_a_budget_in_bytes_is_shared_by_layers_with_and_without_a_window() -> None:
    budget = 200_000
    model = rewritten("gemma3", KvStatic(capacity=2048, step=1), KvEvict(score="knorm", budget=f"{budget // 1000}KB"))
    slots = [layer.policy.slots for layer in cache_spec(model).layers]
    assert slots[0] == WINDOW < slots[1]
    spare = budget - state_bytes(model)
    assert 0 <= spare < state_bytes(model) / sum(slots)


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_tensorrt_and_onnxruntime_graphs_agree(architecture: str) -> None:
    evict = KvEvict(score="knorm", budget="12", sinks=2, recent_window=3)
    onnxruntime_runner, tensorrt_runner = (
        StepRunner(rewritten(architecture, KvStatic(capacity=64, step=1), evict, backend=backend), 2)
        for backend in ("onnxruntime", "tensorrt")
    )
    ids = np.random.default_rng(2).integers(0, VOCABULARY, (2, 40))
    for start in range(40):
        np.testing.assert_allclose(
            *(runner.step(ids[:, start : start + 1])["logits"] for runner in (onnxruntime_runner, tensorrt_runner)), atol=1e-5
        )


@pytest.mark.parametrize(("step", "backend"), [(0, "onnxruntime"), (1, "onnxruntime"), (1, "tensorrt")])
def test_bound_states_equal_states_passed_by_value(step: int, backend: str, tmp_path: Path) -> None:
    evict = KvEvict(score="knorm", budget="12", sinks=2, recent_window=3)
    model = rewritten("llama", KvStatic(capacity=64, step=step), evict, Attention(), backend=backend)
    check_state_binding(model, np.random.default_rng(4).integers(0, VOCABULARY, (2, 40)), step or 5, tmp_path)


def test_tokens_of_the_lowest_score_are_evicted_first() -> None:
    evict = KvEvict(score="knorm", budget="3", sinks=0, recent_window=1)
    model, interface, _, _ = instrumented("llama", KvStatic(capacity=64, step=1), evict, rescored=True)
    runner = StepRunner(model, 1, interface)
    for _ in range(3):
        runner.step(np.array([[5]]))
    assert np.isfinite(runner.states["past_score"]).all()
    runner.states["past_score"][:, :, 1] = -FLOAT32_MAX
    runner.step(np.array([[7]]))
    assert (runner.states["past_position"][0] == [0, 3, 2]).all()


def test_properties_follow_the_rewrites() -> None:
    model = load(export("llama", STYLE))
    assert "grow" in (KV_STATIC.check(model) or "")
    model = rewritten("llama", KvStatic(capacity=64))
    assert (KV_STATIC.check(model), KV_DENSE.check(model)) == (None, None)
    KvEvict(score="knorm", budget="16", recent_window=4).rewrite(model, PassContext(backend="onnxruntime"))
    assert KV_STATIC.check(model) is None
    assert "method `knorm`" in (KV_DENSE.check(model) or "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "8", "sinks": 4, "recent_window": 5}, "of 8 tokens is less than `sinks` 4 + `recent-window` 5"),
        ({"budget": "65"}, "exceeds the capacity of 64"),
        ({"budget": "half"}, "got `half`"),
        ({"budget": "16", "recent_window": 0}, "`recent-window` must be at least 1 (got 0)"),
        ({"budget": "16", "sinks": -1}, "`sinks` must be at least 0 (got -1)"),
        ({"budget": "16", "rescore_interval": -1}, "`rescore-interval` must be at least 0 (got -1)"),
        ({"budget": "16", "pyramid": 0.5}, "`pyramid` must be at least 1 (got 0.5)"),
    ],
)
def test_invalid_budgets_are_refused_and_leave_the_model_unchanged(options: dict[str, Any], message: str) -> None:
    model = rewritten("llama", KvStatic(capacity=64))
    before = ir.to_proto(model).SerializeToString()
    outcome = KvEvict(**{"score": "knorm", "recent_window": 8, **options}).rewrite(model, PassContext(backend="onnxruntime"))
    assert isinstance(outcome, Refusal)
    assert message in outcome.reason
    assert outcome.hint
    assert ir.to_proto(model).SerializeToString() == before
    assert (
        message
        in KvEvict(**{"score": "knorm", "recent_window": 8, **options})
        .estimate(model, PassContext(backend="onnxruntime"))
        .reason
    )


@pytest.mark.parametrize(("architecture", "max_positions"), [("llama", None), ("gpt2", MAX_POSITIONS), ("gptj", MAX_POSITIONS)])
def test_capacity_is_the_number_of_positions(architecture: str, max_positions: int | None) -> None:
    model = rewritten(architecture, KvStatic(capacity=64), KvEvict(score="knorm", budget="16", recent_window=4))
    assert interface_of(model).capacity == max_positions


def test_growing_caches_are_refused() -> None:
    outcome = KvEvict(score="knorm").rewrite(load(export("llama", STYLE)), PassContext(backend="onnxruntime"))
    assert isinstance(outcome, Refusal)
    assert "kv-static" in (outcome.hint or "")


def test_estimate_equals_the_change_in_state_bytes() -> None:
    model = rewritten("llama", KvStatic(capacity=64))
    pass_ = KvEvict(score="knorm", budget="16", recent_window=4)
    before, estimate = state_bytes(model), pass_.estimate(model, PassContext(backend="onnxruntime"))
    pass_.rewrite(model, PassContext(backend="onnxruntime"))
    assert estimate.state_bytes == state_bytes(model) - before
