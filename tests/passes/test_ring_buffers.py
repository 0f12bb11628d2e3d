"""kv-static gives layers with an attention window a ring buffer of that window: exact for any division into steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.decoders import SHORT_WINDOW, VOCABULARY, WINDOW, export, module, torch_steps
from support.rewritten_decoders import STYLE, cache_spec, reference_steps, rewritten
from support.step_runner import StepRunner, check_state_binding, state_bytes

from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.ir.load import load
from ryzen_compile.pipeline.model_snapshot import ModelSnapshot
from ryzen_compile.pipeline.pass_manager import run_passes
from ryzen_compile.registry import properties
from ryzen_compile.spec.kv_cache import CircularWrite, Eviction, GatherWrite, PageSelection, RingBuffer, StaticCache
from ryzen_compile.spec.passes import Change, Pass, PassContext, Refusal
from ryzen_passes.attention import Attention
from ryzen_passes.fold import Fold
from ryzen_passes.kv.compact import KvCompact
from ryzen_passes.kv.evict import KvEvict
from ryzen_passes.kv.evict.rewrite import EvictionConfig
from ryzen_passes.kv.evict.rewrite import state_bytes as evict_state_bytes
from ryzen_passes.kv.quant import KvQuant
from ryzen_passes.kv.select import KvSelect
from ryzen_passes.kv.static import KvStatic
from ryzen_passes.kv.static.cache_view import read_static_cache_view
from ryzen_passes.kv.window import KvWindow
from ryzen_passes.properties import GRAPH_LIVE, KV_DENSE

CONTEXT = PassContext(backend="onnxruntime")
SHORT = "gemma3, short window"
CAPACITY, TOKENS = 96, 70
CHUNKS = [3, 1, 12, 1, 1, 40, 1, 2, 5, 1, 1, 2]
"""Steps that are shorter and longer than the windows of both architectures."""


def random_ids(tokens: int = TOKENS) -> np.ndarray:
    return np.random.default_rng(5).integers(0, VOCABULARY, (2, tokens))


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("architecture", ["mistral", "gemma3", SHORT])
def test_ring_buffers_are_exact(architecture: str, step: int) -> None:
    model = rewritten(architecture, KvStatic(capacity=CAPACITY, step=step))
    assert KV_DENSE.check(model) is None
    chunks = [1] * TOKENS if step else CHUNKS
    expected = torch_steps(architecture, random_ids(), [TOKENS])
    for attention in (False, True):
        if attention:
            Attention().rewrite(model, CONTEXT)
        np.testing.assert_allclose(StepRunner(model, 2).logits(random_ids(), chunks), expected, rtol=0, atol=1e-4)


def test_each_layer_has_the_slots_that_it_needs() -> None:
    steps = {step: cache_spec(rewritten("gemma3", KvStatic(capacity=CAPACITY, step=step))) for step in (0, 1)}
    for spec in steps.values():
        ring, full = (layer.policy for layer in spec.layers)
        assert isinstance(ring, RingBuffer)
        assert (ring.sinks, ring.window, ring.slots, full) == (0, WINDOW, WINDOW, StaticCache(slots=CAPACITY))
        assert spec.is_dense
    assert isinstance(steps[0].layers[0].policy.write, GatherWrite)
    assert isinstance(steps[1].layers[0].policy.write, CircularWrite)


def test_the_memory_of_a_layer_is_its_window() -> None:
    ring, full = (rewritten("gemma3", KvStatic(capacity=512, ring_buffers=ring)) for ring in (True, False))
    rows = (state_bytes(full) - 8) // (2 * 512)
    assert state_bytes(ring) - 8 == rows * (512 + WINDOW)
    source = load(export("gemma3", "optimum-sdpa"))
    for pass_, model in ((KvStatic(capacity=512), ring), (KvStatic(capacity=512, ring_buffers=False), full)):
        assert pass_.estimate(source, CONTEXT).state_bytes == state_bytes(model) - 8


@pytest.mark.parametrize("architecture", ["mistral", SHORT])
def test_a_window_of_the_capacity_or_more_needs_no_ring(architecture: str) -> None:
    window = WINDOW if architecture == "mistral" else SHORT_WINDOW
    spec = cache_spec(rewritten(architecture, KvStatic(capacity=window)))
    assert {type(layer.policy) for layer in spec.layers} == {StaticCache}


def test_rows_of_different_lengths_and_padding_are_exact() -> None:
    model = rewritten(SHORT, KvStatic(capacity=CAPACITY))
    counts = [(4, 9), (1, 0), (0, 1), (1, 1), (12, 3), (0, 7), (1, 1), (2, 0), (1, 4)]
    ids = random_ids(40)
    logits = StepRunner(model, 2).ragged_logits(ids, counts)
    for row, tokens in enumerate(np.sum(counts, axis=0)):
        expected = torch_steps(SHORT, ids[row : row + 1, :tokens], [int(tokens)])
        np.testing.assert_allclose(logits[row], expected[0], rtol=0, atol=1e-4)


def test_padding_of_single_tokens_is_exact() -> None:
    model = rewritten(SHORT, KvStatic(capacity=CAPACITY, step=1))
    counts = [(1, int(step % 3 != 1)) for step in range(30)]
    ids = random_ids(40)
    logits = StepRunner(model, 2).ragged_logits(ids, counts)
    for row, tokens in enumerate(np.sum(counts, axis=0)):
        expected = torch_steps(SHORT, ids[row : row + 1, :tokens], [int(tokens)])
        np.testing.assert_allclose(logits[row], expected[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("passes", [(), (KvQuant(keys="8", values="8"),)], ids=["static", "quant"])
def test_padding_is_not_written_to_a_ring_buffer(passes: tuple[Pass, ...], step: int) -> None:
    """While the ring has free slots, and when it has none."""
    runner, ids = StepRunner(rewritten("mistral", KvStatic(capacity=CAPACITY, step=step), *passes), 2), random_ids()
    mask = np.array([[1], [0]])
    for position in range(2 * WINDOW + 4):
        before = {name: value.copy() for name, value in runner.states.items()}
        runner.step(ids[:, position : position + 1], mask if position % 2 else 1 - mask)
        row = 1 if position % 2 else 0
        assert all(np.array_equal(value[row], before[name][row]) for name, value in runner.states.items())
    (length,) = (state.input for state in runner.interface.states if state.name == "length")
    assert runner.states[length].tolist() == [WINDOW + 2, WINDOW + 2]


def test_graphs_for_prompts_and_for_single_tokens_share_their_states() -> None:
    prompt, step = (StepRunner(rewritten(SHORT, KvStatic(capacity=CAPACITY, step=size)), 2) for size in (0, 1))
    assert {name: array.shape for name, array in prompt.states.items()} == {
        name: array.shape for name, array in step.states.items()
    }
    ids, logits, start = random_ids(), [], 0
    for chunk in CHUNKS:
        runner, other = (step, prompt) if chunk == 1 else (prompt, step)
        logits.append(runner.step(ids[:, start : start + chunk])["logits"])
        other.states, start = runner.states, start + chunk
    np.testing.assert_allclose(np.concatenate(logits, axis=1), torch_steps(SHORT, ids, [TOKENS]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("step", [0, 1])
def test_bound_states_equal_states_passed_by_value(step: int, tmp_path: Path) -> None:
    check_state_binding(rewritten("gemma3", KvStatic(capacity=CAPACITY, step=step)), random_ids(60), step or 6, tmp_path)


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize(
    "passes",
    [
        (),
        (KvWindow(sinks=3, window=30),),
        (KvWindow(sinks=3, window=12),),
        (KvWindow(sinks=0, window=12),),
        (KvQuant(keys="8", values="8"),),
    ],
    ids=lambda passes: ",".join(map(str, passes)) or "static",
)
@pytest.mark.parametrize("architecture", ["mistral", "gemma3"])
def test_rings_after_fold_are_live_and_equal_those_without_it(architecture: str, passes: tuple[Pass, ...], step: int) -> None:
    """fold ensures that every node is used, and the pass manager checks that later passes keep that."""
    static, chunks = KvStatic(capacity=CAPACITY, step=step), [1] * TOKENS if step else CHUNKS
    model = load(export(architecture, STYLE))
    records = run_passes(model, [Fold(), static, *passes], CONTEXT, properties())
    assert all(str(GRAPH_LIVE) in record.properties_after for record in records)
    found = StepRunner(model, 2).logits(random_ids(), chunks)
    expected = (
        StepRunner(rewritten(architecture, static, *passes), 2).logits(random_ids(), chunks)
        if passes
        else torch_steps(architecture, random_ids(), [TOKENS])
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize(
    "pass_",
    [
        KvWindow(sinks=4, window=60),
        KvEvict(score="knorm", budget="30", recent_window=5),
        KvCompact(window=4, budget="40", append_slots=8, sinks=0),
    ],
    ids=str,
)
def test_a_pass_that_no_layer_needs_leaves_the_model_unchanged(pass_: Pass, step: int) -> None:
    model = rewritten("mistral", KvStatic(capacity=CAPACITY, step=step))
    before = ModelSnapshot(model)
    (record,) = run_passes(model, [pass_], CONTEXT, properties())
    assert (record.outcome, before.difference(model)) == ("nothing-to-do", None)
    assert "attention window" in record.reason
    assert interface_of(model).capacity == CAPACITY


def test_a_budget_in_bytes_that_covers_the_rings_keeps_them() -> None:
    """An evicting layer, which has scores, takes more bytes with one slot less than its window than a ring of the window."""
    view = read_static_cache_view(rewritten("mistral", KvStatic(capacity=2 * WINDOW - 3)))
    covered = evict_state_bytes(view, WINDOW)
    assert evict_state_bytes(view, WINDOW - 1) > covered
    kept = []
    for budget in range(covered - 4000, covered + 4000, 40):
        config = KvEvict(score="knorm", budget=f"{budget / 1000}KB", sinks=0, recent_window=1).configure(view, CONTEXT)
        assert isinstance(config, EvictionConfig)
        assert (config.slots == (None, None)) == (budget >= covered)
        kept.append([WINDOW if slots is None else slots for slots in config.slots])
    assert kept == sorted(kept)


STACKS: dict[str, Pass] = {
    "evict": KvEvict(score="knorm", budget=str(CAPACITY), sinks=2, recent_window=5),
    "window": KvWindow(sinks=4, window=CAPACITY - 4),
    "compact": KvCompact(window=4, budget=str(CAPACITY - 8), append_slots=8, sinks=0),
    "select": KvSelect(page_size=8, selected_pages=CAPACITY // 8),
}


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("stack", STACKS)
def test_other_passes_leave_a_ring_buffer_that_they_cover(stack: str, step: int) -> None:
    model = rewritten("gemma3", KvStatic(capacity=CAPACITY, step=step), STACKS[stack])
    ring, other = (layer.policy for layer in cache_spec(model).layers)
    assert isinstance(ring, RingBuffer)
    assert ring.window == WINDOW
    assert not isinstance(other, StaticCache)
    chunks = [1] * TOKENS if step else CHUNKS
    logits = StepRunner(model, 2).logits(random_ids(), chunks)
    np.testing.assert_allclose(logits, torch_steps("gemma3", random_ids(), [TOKENS]), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("step", "chunks"), [(0, CHUNKS), (1, [1] * TOKENS)], ids=["chunks", "single-tokens"])
@pytest.mark.parametrize(
    "pass_",
    [
        KvEvict(score="value-norm", budget="30", sinks=2, recent_window=5),
        KvEvict(score="value-norm", budget="15", sinks=2, recent_window=5),
        KvSelect(page_size=8, selected_pages=3),
        KvWindow(sinks=3, window=30),
        KvWindow(sinks=3, window=12),
        KvCompact(window=3, budget="25", append_slots=4, sinks=0, pooling=1),
        KvCompact(window=3, budget="15", append_slots=4, sinks=0, pooling=1),
    ],
    ids=str,
)
def test_methods_over_ring_buffers_agree_with_torch(pass_: Pass, step: int, chunks: list[int]) -> None:
    model = rewritten("gemma3", KvStatic(capacity=CAPACITY, step=step), pass_)
    found = StepRunner(model, 2).logits(random_ids(), chunks)
    expected = reference_steps(module("gemma3"), type(pass_), cache_spec(model), random_ids(), chunks, single_token=step == 1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize(("step", "chunks"), [(0, CHUNKS), (1, [1] * TOKENS)], ids=["chunks", "single-tokens"])
@pytest.mark.parametrize("evicts", [False, True], ids=["static", "evict"])
def test_quantized_ring_buffers_agree_with_torch(evicts: bool, step: int, chunks: list[int]) -> None:
    evict = [KvEvict(score="value-norm", budget="30", sinks=2, recent_window=5)] if evicts else []
    model = rewritten("gemma3", KvStatic(capacity=CAPACITY, step=step), *evict, KvQuant(keys="8", values="8"))
    spec = cache_spec(model)
    assert all(layer.key.quantization is not None for layer in spec.layers)
    found = StepRunner(model, 2).logits(random_ids(), chunks)
    expected = reference_steps(module("gemma3"), KvQuant, spec, random_ids(), chunks, single_token=step == 1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-3)
    assert np.abs(found - torch_steps("gemma3", random_ids(), [TOKENS])).max() > 1e-3


def test_a_model_of_rings_has_no_pages() -> None:
    outcome = KvSelect(page_size=8, selected_pages=2).rewrite(rewritten("mistral", KvStatic(capacity=CAPACITY)), CONTEXT)
    assert isinstance(outcome, Refusal)
    assert "no pages to select" in outcome.reason
    hint = f"kv-static{{capacity={CAPACITY},ring-buffers=false}}"
    assert hint in (outcome.hint or "")
    model = rewritten("mistral", KvStatic(capacity=CAPACITY, ring_buffers=False), KvSelect(page_size=8, selected_pages=2))
    assert all(isinstance(layer.policy, PageSelection) for layer in cache_spec(model).layers)


def test_a_budget_below_the_window_evicts_within_it() -> None:
    model = rewritten("mistral", KvStatic(capacity=CAPACITY), KvEvict(score="knorm", budget="15", sinks=2, recent_window=5))
    assert all(isinstance(layer.policy, Eviction) for layer in cache_spec(model).layers)
    outcome = KvEvict(score="knorm", budget="30").rewrite(rewritten("mistral", KvStatic(capacity=CAPACITY)), CONTEXT)
    assert isinstance(outcome, Refusal)
    outcome = KvEvict(score="knorm", budget="30", recent_window=5).rewrite(
        rewritten("mistral", KvStatic(capacity=CAPACITY)), CONTEXT
    )
    assert isinstance(outcome, Change)
    assert outcome.summary == "no layer evicts; 2 layers keep their attention window, which the budget covers"
