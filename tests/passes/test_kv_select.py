"""kv-select: each query reads the pages that a slow reference selects; exact within the selected pages; nothing is evicted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.decoders import VOCABULARY, WINDOW, torch_steps
from support.examples import examples
from support.rewritten_decoders import instrumented, rewritten
from support.step_runner import StepRunner, check_state_binding, state_bytes

from ryzen_compile.errors import ModelError
from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.spec.kv_cache import read_kv_cache_spec
from ryzen_compile.spec.passes import PassContext, Refusal
from ryzen_passes.attention import Attention
from ryzen_passes.kv.select import KvSelect
from ryzen_passes.kv.static import KvStatic
from ryzen_passes.properties import KV_DENSE, KV_STATIC

Array = np.ndarray[Any, Any]
STYLE = "optimum-sdpa"
CAPACITY, PAGE_SIZE = 48, 4
CONTEXT = PassContext(backend="onnxruntime")


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gptj", "falcon", "gpt2"])
@pytest.mark.parametrize("score", ["bound", "cosine"])
def test_exact_within_the_selected_pages(architecture: str, score: str) -> None:
    select = KvSelect(page_size=PAGE_SIZE, selected_pages=10, page_score=score)  # type: ignore[arg-type]
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (2, 40))
    for attention in (False, True):
        model = rewritten(
            architecture, KvStatic(ring_buffers=False, capacity=CAPACITY, step=1), select, *([Attention()] if attention else [])
        )
        runner = StepRunner(model, 2)
        logits = runner.logits(ids, [1] * 40)
        np.testing.assert_allclose(logits, torch_steps(architecture, ids, [1] * 40), rtol=0, atol=1e-4)


def test_prompt_graph_reads_every_page_and_updates_the_summaries() -> None:
    select, ids = KvSelect(page_size=PAGE_SIZE, selected_pages=12), np.random.default_rng(2).integers(0, VOCABULARY, (2, 45))
    prompts, steps = (StepRunner(rewritten("llama", KvStatic(capacity=CAPACITY, step=step), select), 2) for step in (0, 1))
    logits = [prompts.step(ids[:, :13])["logits"], prompts.step(ids[:, 13:20])["logits"]]
    steps.states = prompts.states
    logits += [steps.step(ids[:, at : at + 1])["logits"] for at in range(20, 30)]
    prompts.states = steps.states
    logits += [prompts.step(ids[:, 30:40])["logits"]]
    steps.states = prompts.states
    logits += [steps.step(ids[:, at : at + 1])["logits"] for at in range(40, 45)]
    np.testing.assert_allclose(np.concatenate(logits, axis=1), torch_steps("llama", ids, [45]), rtol=0, atol=1e-4)


def page_summary(keys: Array, score: str) -> list[Array]:
    """Return the summary of a page of `keys` (tokens, head_size)."""
    if score == "bound":
        return [keys.min(axis=0), keys.max(axis=0)]
    return [(keys.astype(np.float64) / np.linalg.norm(keys.astype(np.float64), axis=1, keepdims=True)).sum(axis=0)]


def page_score(queries: Array, summary: list[Array], score: str) -> float:
    """Return the score of a page for `queries` (heads, head_size)."""
    if score == "bound":
        return max(float(np.maximum(query * summary[0], query * summary[1]).sum()) for query in queries)
    return max(float(query @ summary[0] / np.linalg.norm(query) / np.linalg.norm(summary[0])) for query in queries)


def reference_attention(
    queries: Array, keys: Array, values: Array, score: str, selected_pages: int, window: int | None
) -> Array:
    """Return (heads, head_size) float64: the attention of the last token's `queries` over the pages that they select."""
    count = len(keys)
    pages = [range(start, min(start + PAGE_SIZE, count)) for start in range(0, count, PAGE_SIZE)]
    candidates = [page for page in pages[:-1] if window is None or page[0] + PAGE_SIZE - 1 > count - 1 - window]
    candidates.sort(key=lambda page: -page_score(queries, page_summary(keys[page], score), score))
    read = [
        at
        for page in [pages[-1], *candidates[: selected_pages - 1]]
        for at in page
        if window is None or at > count - 1 - window
    ]
    logits = queries @ keys[read].T.astype(np.float64) / np.sqrt(keys.shape[1])
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    output: Array = weights / weights.sum(axis=1, keepdims=True) @ values[read]
    return output


@settings(max_examples=examples(10), deadline=None)
@given(data=st.data())
def test_every_query_reads_the_pages_of_the_reference(data: st.DataObject) -> None:
    architecture, score = data.draw(
        st.sampled_from([("llama", "bound"), ("mistral", "bound"), ("llama", "cosine"), ("gptj", "bound")])
    )
    selected_pages, batch = data.draw(st.sampled_from([1, 2, 5])), data.draw(st.integers(1, 2))
    select = KvSelect(page_size=PAGE_SIZE, selected_pages=selected_pages, page_score=score)
    prompts, steps = (
        instrumented(architecture, KvStatic(ring_buffers=False, capacity=CAPACITY, step=step), select) for step in (0, 1)
    )
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    history: dict[tuple[int, int, int], tuple[list[Array], list[Array]]] = {}
    seen_tokens = np.zeros(batch, int)
    states = StepRunner(prompts[0], batch, prompts[1]).states
    runs = {step: StepRunner(case[0], batch, case[1]) for step, case in ((0, prompts), (1, steps))}
    window = WINDOW if architecture == "mistral" else None
    for step in data.draw(st.lists(st.sampled_from([0, 1, 1, 1]), min_size=1, max_size=12)):
        _, interface, spec, layers = steps if step else prompts
        step_size = step or data.draw(st.integers(1, 9))
        if seen_tokens.max() + step_size > CAPACITY:
            break
        counts = np.array([data.draw(st.integers(0, step_size)) for _ in range(batch)])
        runs[step].states = states
        mask = (np.arange(step_size) < counts[:, None]).astype(np.int64)
        outputs = runs[step].step(random.integers(0, VOCABULARY, (batch, step_size)), mask)
        seen_tokens += counts
        for state in interface.states:
            for row in np.flatnonzero(counts == 0):
                if state.name.split(".")[0] in ("low", "high", "direction"):
                    assert np.array_equal(outputs[state.output][row], states[state.input][row]), state.name
        states = runs[step].states
        for index, layer in enumerate(spec.layers):
            query, key, value, attention_output = (outputs[name] for name in layers[index][:4])
            for row in range(batch):
                for head in range(layer.kv_heads):
                    keys, values = history.setdefault((index, row, head), ([], []))
                    keys += list(key[row, head, : counts[row]])
                    values += list(value[row, head, : counts[row]])
                    summary_names = ("low", "high") if score == "bound" else ("direction",)
                    for page in range(0, len(keys), PAGE_SIZE):
                        for summary_name, expected in zip(
                            summary_names, page_summary(np.array(keys[page : page + PAGE_SIZE]), score), strict=True
                        ):
                            summary = outputs[f"present_{summary_name}.{index}"][row, head, page // PAGE_SIZE]
                            np.testing.assert_allclose(summary, expected, rtol=0, atol=0 if score == "bound" else 1e-5)
                    if step and counts[row]:
                        float64_inputs = [np.array(part, np.float64) for part in (query[row, head], keys, values)]
                        expected = reference_attention(*float64_inputs, score, selected_pages, window)
                        np.testing.assert_allclose(attention_output[row, head], expected, rtol=0, atol=1e-4)


def selected_pages_by_step(architecture: str, selected_pages: int) -> list[list[set[int]]]:
    """Return the pages that each kv-head of the first layer reads, token by token until the cache is full."""
    model = rewritten(
        architecture,
        KvStatic(ring_buffers=False, capacity=CAPACITY, step=1),
        KvSelect(page_size=PAGE_SIZE, selected_pages=selected_pages),
    )
    node = next(node for node in model.graph if node.op_type == "TopK")
    interface, name = interface_of(model), node.outputs[1].name or ""
    model.graph.outputs.append(node.outputs[1])
    runner, pages_by_step = StepRunner(model, 1, interface), []
    for token in np.random.default_rng(3).integers(0, VOCABULARY, CAPACITY):
        pages_by_step.append([set(pages.tolist()) for pages in runner.step(np.array([[token]]))[name][0]])
    return pages_by_step


def test_pages_can_be_selected_again_after_a_step_without_them() -> None:
    """No page is evicted: a page that a query does not read is available to later queries."""
    selected = [heads[0] for heads in selected_pages_by_step("llama", 2)]
    assert all(at // PAGE_SIZE in pages for at, pages in enumerate(selected))
    other_pages = [next(iter(pages - {at // PAGE_SIZE})) for at, pages in enumerate(selected) if at >= 2 * PAGE_SIZE]
    assert any(
        earlier != now and now in other_pages[:at]
        for at, (earlier, now) in enumerate(zip(other_pages, other_pages[1:], strict=False), 1)
    )


def test_pages_outside_the_attention_window_are_not_selected() -> None:
    for at, heads in enumerate(selected_pages_by_step("mistral", 3)):
        if at >= WINDOW:
            assert all((page + 1) * PAGE_SIZE - 1 > at - WINDOW for pages in heads for page in pages)


@pytest.mark.parametrize("step", [0, 1])
def test_bound_states_equal_states_passed_by_value(step: int, tmp_path: Path) -> None:
    model = rewritten(
        "llama", KvStatic(capacity=CAPACITY, step=step), KvSelect(page_size=PAGE_SIZE, selected_pages=3), Attention()
    )
    check_state_binding(model, np.random.default_rng(4).integers(0, VOCABULARY, (2, 40)), step or 5, tmp_path)


def test_attention_over_pages_is_a_single_node() -> None:
    model = rewritten("llama", KvStatic(capacity=CAPACITY, step=1), KvSelect(page_size=PAGE_SIZE, selected_pages=3))
    attentions = [node for node in model.graph if node.op_type == "Attention"]
    rows = [
        value.shape[2] for node in attentions for value in node.inputs[1:3] if value is not None and value.shape is not None
    ]
    assert rows == [3 * PAGE_SIZE] * 2 * len(attentions)


def test_properties_and_specification_follow() -> None:
    model = rewritten("llama", KvStatic(capacity=CAPACITY), KvSelect(page_size=PAGE_SIZE, selected_pages=3))
    assert KV_STATIC.check(model) is None
    assert "`select`" in (KV_DENSE.check(model) or "")
    spec = read_kv_cache_spec(model)
    assert spec is not None
    assert {layer.policy.slots for layer in spec.layers} == {CAPACITY}
    with pytest.raises(ModelError, match="depends on the queries"):
        KvSelect.torch_cache_factory(spec, single_token=True)


@pytest.mark.parametrize(
    ("options", "backend", "message", "hint"),
    [
        ({"selected_pages": 0}, "onnxruntime", "`selected-pages` must be at least 1 (got 0)", "selected-pages="),
        ({"page_size": 0, "selected_pages": 1}, "onnxruntime", "`page-size` must be at least 1 (got 0)", "page-size="),
        (
            {"page_size": 5, "selected_pages": 1},
            "onnxruntime",
            "of 48 tokens is not a multiple of `page-size` 5",
            "capacity=45",
        ),
        (
            {"page_size": 4, "selected_pages": 13},
            "onnxruntime",
            "13 exceeds the 12 pages of the cache (capacity 48",
            "at most 12",
        ),
    ],
)
def test_invalid_options_are_refused_and_leave_the_model_unchanged(
    options: dict[str, int], backend: str, message: str, hint: str
) -> None:
    model = rewritten("llama", KvStatic(capacity=CAPACITY))
    before = ir.to_proto(model).SerializeToString()
    outcome = KvSelect(**options).rewrite(model, PassContext(backend=backend))  # type: ignore[arg-type]
    assert isinstance(outcome, Refusal)
    assert message in outcome.reason
    assert hint in (outcome.hint or "")
    assert ir.to_proto(model).SerializeToString() == before
    assert message in KvSelect(**options).estimate(model, CONTEXT).reason  # type: ignore[arg-type]


def test_tensorrt_limits_the_number_of_selected_pages() -> None:
    model = rewritten("llama", KvStatic(capacity=4096))
    outcome = KvSelect(page_size=1, selected_pages=3841).rewrite(model, PassContext(backend="tensorrt-rtx"))
    assert isinstance(outcome, Refusal)
    assert "3841 exceeds the maximum of 3840 on tensorrt-rtx (TopK)" in outcome.reason


@pytest.mark.parametrize("score", ["bound", "cosine"])
def test_estimate_equals_the_change_in_state_bytes(score: str) -> None:
    model = rewritten("llama", KvStatic(capacity=CAPACITY))
    select = KvSelect(page_size=PAGE_SIZE, selected_pages=2, page_score=score)  # type: ignore[arg-type]
    before, estimate = state_bytes(model), select.estimate(model, CONTEXT)
    select.rewrite(model, CONTEXT)
    assert estimate.state_bytes == state_bytes(model) - before
