"""kv-evict: its states hold what a slow reference holds, slot by slot, and nothing is lost within the budget."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support.decoders import MAX_POSITIONS, VOCABULARY, export, torch_steps
from support.kv_oracle import FLOAT32_MAX, HeadOracle
from support.step_runner import StepRunner, check_state_binding

from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.ir.load import load
from ryzen_compile.spec.interface import Interface
from ryzen_compile.spec.kv_cache import KVCacheSpec, read_kv_cache_spec
from ryzen_compile.spec.passes import Change, Pass, PassContext, Refusal
from ryzen_passes.attention import Attention
from ryzen_passes.kv.evict import KvEvict
from ryzen_passes.kv.static import KvStatic
from ryzen_passes.properties import KV_DENSE, KV_STATIC

Array = np.ndarray[Any, Any]
STYLE = "optimum-sdpa"


def rewritten(architecture: str, *passes: Pass, backend: str = "onnxruntime") -> ir.Model:
    model = load(export(architecture, STYLE))
    for pass_ in passes:
        outcome = pass_.rewrite(model, PassContext(backend=backend))
        assert isinstance(outcome, Change), outcome
    return model


@functools.cache
def watched(step: int, backend: str, evict: KvEvict) -> tuple[ir.Model, Interface, KVCacheSpec]:
    """Return an evicting llama with what each step adds among its outputs, its interface without those, and its map."""
    model = rewritten("llama", KvStatic(capacity=64, step=step), evict, backend=backend)
    interface, told = interface_of(model), read_kv_cache_spec(model)
    assert told is not None
    values = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.extend(values[side.update] for layer in told.layers for side in (layer.key, layer.value))
    model.graph.outputs.extend(
        values[f"{name}_again"] for name in {layer.score_state for layer in told.layers if layer.rescore_interval}
    )
    return model, interface, told


SCORES = {
    "knorm": lambda key, value, position, anchor: -np.sqrt(np.float32((key.astype(np.float64) ** 2).sum())),
    "value-norm": lambda key, value, position, anchor: np.sqrt(np.float32((value.astype(np.float64) ** 2).sum())),
    "position": lambda key, value, position, anchor: float(position),
    "keydiff": lambda key, value, position, anchor: -float(unit(key) @ unit(anchor)),
}


FORMS = ((0, "onnxruntime"), (1, "onnxruntime"), (1, "tensorrt"))
"""Tokens a step, 0 for any number, and the backend."""
SIZES = ((0, 1, 3), (2, 3, 1), (4, 2, 0))
"""Sinks, recent tokens, and how many more a head keeps."""
CASES = (
    *((score, 0, 1.0, form, size) for score, size in zip(SCORES, itertools.cycle(SIZES), strict=False) for form in FORMS),
    *(("keydiff", every, 1.0, form, SIZES[0]) for every in (1, 3) for form in FORMS),
    *(("keydiff", 2, 2.0, form, SIZES[1]) for form in FORMS),
)


def unit(vector: Array) -> Array:
    wide = vector.astype(np.float64)
    return wide / np.linalg.norm(wide)


@settings(max_examples=40, deadline=None, report_multiple_bugs=False, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(data=st.data())
def test_every_slot_holds_what_the_slow_reference_holds(data: st.DataObject) -> None:
    score, every, pyramid, (step, backend), (sinks, recent, spare) = data.draw(st.sampled_from(CASES))
    evict = KvEvict(
        score=score,  # type: ignore[arg-type]
        budget=str(sinks + recent + spare),
        sinks=sinks,
        recent_window=recent,
        rescore_interval=every,
        pyramid=pyramid,
    )
    model, interface, told = watched(step, backend, evict)
    batch = data.draw(st.integers(1, 3))
    stepper = StepRunner(model, batch, interface)
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    heads = {
        (layer, row, head): HeadOracle(told.layers[layer].slots or 0, sinks, recent)
        for layer in range(len(told.layers))
        for row in range(batch)
        for head in range(told.layers[layer].kv_heads)
    }
    anchors = {own: np.zeros(told.layers[0].key.head_size) for own in heads}
    seen = np.zeros(batch, int)
    for _ in range(data.draw(st.integers(1, 14))):
        width = step or data.draw(st.integers(1, 6))
        counts = np.array([data.draw(st.integers(0, width)) for _ in range(batch)])
        mask = (np.arange(width) < counts[:, None]).astype(np.int64)
        before = {name: value.copy() for name, value in stepper.states.items()}
        outputs = stepper.step(random.integers(0, VOCABULARY, (batch, width)), mask)
        states = {state.name: outputs[state.output] for state in stepper.interface.states}
        firsts: dict[str, int] = {}
        for at, layer in enumerate(told.layers):
            keys, values = outputs[layer.key.update], outputs[layer.value.update]
            first = firsts.get(layer.score_state or "", 0)
            firsts[layer.score_state or ""] = first + layer.kv_heads
            for row in range(batch):
                for head in range(layer.kv_heads):
                    reference, place = heads[at, row, head], (row, first + head)
                    positions, scores = states[layer.position_state or ""][place], states[layer.score_state or ""][place]
                    held = {int(p): float(s) for p, s in zip(positions, scores, strict=True)}
                    if layer.rescore_interval and counts[row]:
                        rows = -(-reference.slots // layer.rescore_interval) if step else reference.slots
                        for slot in (int(seen[row]) * rows + np.arange(rows)) % reference.slots if step else range(rows):
                            if (token := reference.entries[slot]) is not None:
                                again = float(outputs[f"{layer.score_state}_again"][place][slot])
                                expected = SCORES[score](*token[2:], token[0], anchors[at, row, head])
                                np.testing.assert_allclose(again, expected, rtol=0, atol=1e-5)
                                reference.entries[slot] = (token[0], again, *token[2:])
                    fresh = [(int(seen[row]) + n, keys[row, head, n], values[row, head, n]) for n in range(counts[row])]
                    for _, key, _ in fresh:
                        anchors[at, row, head] += unit(key)
                    anchor = anchors[at, row, head]
                    scored = [(p, SCORES[score](key, value, p, anchor), key, value) for p, key, value in fresh]
                    # The graph's own score of a token that stayed decides ties as the graph saw them.
                    reference.append([(p, held.get(p, float(s)), key, value) for p, s, key, value in scored])
                    for position, expected, _, _ in scored:
                        if position in held:
                            np.testing.assert_allclose(held[position], expected, rtol=1e-5, atol=1e-5)
                    assert positions.tolist() == reference.positions()
                    for slot, token in enumerate(reference.entries):
                        if token is not None:
                            assert scores[slot] == np.float32(token[1])
                            assert np.array_equal(states[layer.key.state or ""][row, head, slot], token[2])
                            assert np.array_equal(states[layer.value.state or ""][row, head, slot], token[3])
        for row in np.flatnonzero(counts == 0):
            for state in stepper.interface.states:
                assert np.array_equal(stepper.states[state.input][row], before[state.input][row]), state.name
        seen += counts
        assert stepper.states["past_length"].tolist() == seen.tolist()


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2", "falcon"])
@pytest.mark.parametrize("step", [0, 1])
def test_nothing_is_lost_within_the_budget(architecture: str, step: int) -> None:
    model = rewritten(
        architecture, KvStatic(capacity=80, step=step), KvEvict(budget="50%", sinks=2, recent_window=8), Attention()
    )
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (2, 40))
    chunks = [1] * 40 if step else [7, 1, 12, *[1] * 20]
    stepper, logits, at = StepRunner(model, 2), [], 0
    for chunk in chunks:
        logits.append(stepper.step(ids[:, at : at + chunk])["logits"])
        at += chunk
    np.testing.assert_allclose(np.concatenate(logits, axis=1), torch_steps(architecture, ids, chunks), atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_tensorrt_and_onnxruntime_get_graphs_that_agree(architecture: str) -> None:
    evict = KvEvict(budget="12", sinks=2, recent_window=3)
    one, other = (
        StepRunner(rewritten(architecture, KvStatic(capacity=64, step=1), evict, backend=backend), 2)
        for backend in ("onnxruntime", "tensorrt")
    )
    ids = np.random.default_rng(2).integers(0, VOCABULARY, (2, 40))
    for at in range(40):
        np.testing.assert_allclose(*(side.step(ids[:, at : at + 1])["logits"] for side in (one, other)), atol=1e-5)


@pytest.mark.parametrize(("step", "backend"), [(0, "onnxruntime"), (1, "onnxruntime"), (1, "tensorrt")])
def test_states_bound_to_memory_give_what_states_handed_on_give(step: int, backend: str, tmp_path: Path) -> None:
    evict = KvEvict(budget="12", sinks=2, recent_window=3)
    model = rewritten("llama", KvStatic(capacity=64, step=step), evict, Attention(), backend=backend)
    check_state_binding(model, np.random.default_rng(4).integers(0, VOCABULARY, (2, 40)), step or 5, tmp_path)


def test_scores_that_are_no_numbers_are_the_first_to_go() -> None:
    model, interface, _ = watched(1, "onnxruntime", KvEvict(budget="3", sinks=0, recent_window=1))
    stepper = StepRunner(model, 1, interface)
    for _ in range(3):
        stepper.step(np.array([[5]]))
    assert np.isfinite(stepper.states["past_score"]).all()
    stepper.states["past_score"][:, :, 1] = -FLOAT32_MAX
    stepper.step(np.array([[7]]))
    assert (stepper.states["past_position"][0] == [0, 3, 2]).all()


def test_facts_follow_the_rewrites() -> None:
    model = load(export("llama", STYLE))
    assert "grow" in (KV_STATIC.check(model) or "")
    model = rewritten("llama", KvStatic(capacity=64))
    assert (KV_STATIC.check(model), KV_DENSE.check(model)) == (None, None)
    KvEvict(budget="16", recent_window=4).rewrite(model, PassContext(backend="onnxruntime"))
    assert KV_STATIC.check(model) is None
    assert "by `knorm`" in (KV_DENSE.check(model) or "")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"budget": "8", "sinks": 4, "recent": 5}, "less than 4 sinks and 5 recent"),
        ({"budget": "65"}, "more than the capacity of 64"),
        ({"budget": "half"}, "no budget"),
        ({"budget": "16", "recent": 0}, "cannot be"),
        ({"budget": "16", "sinks": -1}, "cannot be"),
    ],
)
def test_budgets_that_cannot_be_are_refused_and_nothing_is_changed(options: dict[str, Any], says: str) -> None:
    model = rewritten("llama", KvStatic(capacity=64))
    before = ir.to_proto(model).SerializeToString()
    outcome = KvEvict(**{"recent": 8, **options}).rewrite(model, PassContext(backend="onnxruntime"))
    assert isinstance(outcome, Refusal)
    assert says in outcome.reason
    assert outcome.hint
    assert ir.to_proto(model).SerializeToString() == before
    assert says in KvEvict(**{"recent": 8, **options}).estimate(model, PassContext(backend="onnxruntime")).reason


@pytest.mark.parametrize(("architecture", "longest"), [("llama", None), ("gpt2", MAX_POSITIONS), ("gptj", MAX_POSITIONS)])
def test_a_sequence_ends_where_the_positions_do(architecture: str, longest: int | None) -> None:
    model = rewritten(architecture, KvStatic(capacity=64), KvEvict(budget="16", recent_window=4))
    assert interface_of(model).capacity == longest


def test_growing_caches_are_refused() -> None:
    outcome = KvEvict().rewrite(load(export("llama", STYLE)), PassContext(backend="onnxruntime"))
    assert isinstance(outcome, Refusal)
    assert "kv-static" in (outcome.hint or "")


def test_the_estimate_is_what_the_states_come_to() -> None:
    model = rewritten("llama", KvStatic(capacity=64))
    pass_ = KvEvict(budget="16", recent_window=4)
    before, estimate = _state_bytes(model), pass_.estimate(model, PassContext(backend="onnxruntime"))
    pass_.rewrite(model, PassContext(backend="onnxruntime"))
    assert estimate.state_bytes == _state_bytes(model) - before


def _state_bytes(model: ir.Model) -> int:
    interface = interface_of(model)
    specs = [interface.input(state.input) for state in interface.states]
    return sum(
        int(np.prod([1 if isinstance(dim, str) else dim for dim in spec.dims or ()])) * np.dtype(spec.dtype).itemsize
        for spec in specs
    )
