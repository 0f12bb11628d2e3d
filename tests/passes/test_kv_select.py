"""kv-select: each query reads the pages that a slow reference picks, nothing is lost within them, and nothing is evicted."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.decoders import VOCABULARY, WINDOW, export, torch_steps
from support.step_runner import StepRunner, check_state_binding

from ryzen_compile.errors import ModelError
from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.ir.load import load
from ryzen_compile.spec.interface import Interface
from ryzen_compile.spec.kv_cache import KVCacheSpec, read_kv_cache_spec
from ryzen_compile.spec.passes import Change, Pass, PassContext, Refusal
from ryzen_passes.attention import Attention
from ryzen_passes.kv.select import KvSelect
from ryzen_passes.kv.static import KvStatic
from ryzen_passes.properties import KV_DENSE, KV_STATIC

Array = np.ndarray[Any, Any]
STYLE = "optimum-sdpa"
CAPACITY, PAGE = 48, 4
CONTEXT = PassContext(backend="onnxruntime")


def rewritten(architecture: str, *passes: Pass) -> ir.Model:
    model = load(export(architecture, STYLE))
    for pass_ in passes:
        outcome = pass_.rewrite(model, CONTEXT)
        assert isinstance(outcome, Change), outcome
    return model


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gptj", "falcon", "gpt2"])
@pytest.mark.parametrize("score", ["bound", "cosine"])
def test_nothing_is_lost_within_the_pages(architecture: str, score: str) -> None:
    select = KvSelect(page_size=PAGE, selected_pages=10, score=score)  # type: ignore[arg-type]
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (2, 40))
    for attention in (False, True):
        model = rewritten(architecture, KvStatic(capacity=CAPACITY, step=1), select, *([Attention()] if attention else []))
        stepper = StepRunner(model, 2)
        logits = np.concatenate([stepper.step(ids[:, at : at + 1])["logits"] for at in range(40)], axis=1)
        np.testing.assert_allclose(logits, torch_steps(architecture, ids, [1] * 40), rtol=0, atol=1e-4)


def test_a_graph_for_prompts_reads_everything_and_tells_of_pages() -> None:
    select, ids = KvSelect(page_size=PAGE, selected_pages=12), np.random.default_rng(2).integers(0, VOCABULARY, (2, 45))
    prompts, steps = (StepRunner(rewritten("llama", KvStatic(capacity=CAPACITY, step=step), select), 2) for step in (0, 1))
    logits = [prompts.step(ids[:, :13])["logits"], prompts.step(ids[:, 13:20])["logits"]]
    steps.states = prompts.states
    logits += [steps.step(ids[:, at : at + 1])["logits"] for at in range(20, 30)]
    prompts.states = steps.states
    logits += [prompts.step(ids[:, 30:40])["logits"]]
    steps.states = prompts.states
    logits += [steps.step(ids[:, at : at + 1])["logits"] for at in range(40, 45)]
    np.testing.assert_allclose(np.concatenate(logits, axis=1), torch_steps("llama", ids, [45]), rtol=0, atol=1e-4)


@functools.cache
def watched(architecture: str, step: int, score: str, keep: int) -> tuple[ir.Model, Interface, KVCacheSpec, list[list[str]]]:
    """Return a decoder whose queries, keys, values and attention of a step are outputs; its interface, map, and their names."""
    select = KvSelect(page_size=PAGE, selected_pages=keep, score=score)  # type: ignore[arg-type]
    model = rewritten(architecture, KvStatic(capacity=CAPACITY, step=step), select)
    interface, told = interface_of(model), read_kv_cache_spec(model)
    assert told is not None
    nodes = {node.name: node for node in model.graph}
    values = {value.name: value for node in model.graph for value in node.outputs}
    names: list[list[str]] = []
    for layer in told.layers:
        node = nodes[layer.attention_node]
        seen = [node.inputs[0], values[layer.key.update], values[layer.value.update], node.outputs[0]]
        names.append([value.name or "" for value in seen if value is not None])
        model.graph.outputs.extend(value for value in seen if value is not None)
    return model, interface, told, names


def told_of(keys: Array, score: str) -> list[Array]:
    """Return what is told of a page of `keys` (tokens, size)."""
    if score == "bound":
        return [keys.min(axis=0), keys.max(axis=0)]
    return [(keys.astype(np.float64) / np.linalg.norm(keys.astype(np.float64), axis=1, keepdims=True)).sum(axis=0)]


def worth(queries: Array, told: list[Array], score: str) -> float:
    """Return what a page is worth to `queries` (heads, size)."""
    if score == "bound":
        return max(float(np.maximum(query * told[0], query * told[1]).sum()) for query in queries)
    return max(float(query @ told[0] / np.linalg.norm(query) / np.linalg.norm(told[0])) for query in queries)


def attended(queries: Array, keys: Array, values: Array, score: str, keep: int, window: int | None) -> Array:
    """Return (heads, size): what `queries` of the last of the tokens read of the pages that they pick; float64."""
    count = len(keys)
    pages = [range(start, min(start + PAGE, count)) for start in range(0, count, PAGE)]
    near = [page for page in pages[:-1] if window is None or page[0] + PAGE - 1 > count - 1 - window]
    near.sort(key=lambda page: -worth(queries, told_of(keys[page], score), score))
    read = [at for page in [pages[-1], *near[: keep - 1]] for at in page if window is None or at > count - 1 - window]
    logits = queries @ keys[read].T.astype(np.float64) / np.sqrt(keys.shape[1])
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    found: Array = shares / shares.sum(axis=1, keepdims=True) @ values[read]
    return found


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_every_query_reads_what_the_slow_reference_reads(data: st.DataObject) -> None:
    architecture, score = data.draw(
        st.sampled_from([("llama", "bound"), ("mistral", "bound"), ("llama", "cosine"), ("gptj", "bound")])
    )
    keep, batch = data.draw(st.sampled_from([1, 2, 5])), data.draw(st.integers(1, 2))
    prompts, steps = (watched(architecture, step, score, keep) for step in (0, 1))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    held: dict[tuple[int, int, int], tuple[list[Array], list[Array]]] = {}
    seen = np.zeros(batch, int)
    states = StepRunner(prompts[0], batch, prompts[1]).states
    runs = {step: StepRunner(case[0], batch, case[1]) for step, case in ((0, prompts), (1, steps))}
    window = WINDOW if architecture == "mistral" else None
    for step in data.draw(st.lists(st.sampled_from([0, 1, 1, 1]), min_size=1, max_size=12)):
        _, interface, told, names = steps if step else prompts
        width = step or data.draw(st.integers(1, 9))
        if seen.max() + width > CAPACITY:
            break
        counts = np.array([data.draw(st.integers(0, width)) for _ in range(batch)])
        runs[step].states = states
        mask = (np.arange(width) < counts[:, None]).astype(np.int64)
        outputs = runs[step].step(random.integers(0, VOCABULARY, (batch, width)), mask)
        seen += counts
        for state in interface.states:
            for row in np.flatnonzero(counts == 0):
                if state.name.split(".")[0] in ("low", "high", "direction"):
                    assert np.array_equal(outputs[state.output][row], states[state.input][row]), state.name
        states = runs[step].states
        for at, layer in enumerate(told.layers):
            query, key, value, gave = (outputs[name] for name in names[at])
            for row in range(batch):
                for head in range(layer.kv_heads):
                    keys, values = held.setdefault((at, row, head), ([], []))
                    keys += list(key[row, head, : counts[row]])
                    values += list(value[row, head, : counts[row]])
                    words = ("low", "high") if score == "bound" else ("direction",)
                    for page in range(0, len(keys), PAGE):
                        for word, expected in zip(words, told_of(np.array(keys[page : page + PAGE]), score), strict=True):
                            found = outputs[f"present_{word}.{at}"][row, head, page // PAGE]
                            np.testing.assert_allclose(found, expected, rtol=0, atol=0 if score == "bound" else 1e-5)
                    if step and counts[row]:
                        wide = [np.array(part, np.float64) for part in (query[row, head], keys, values)]
                        expected = attended(*wide, score, keep, window)
                        np.testing.assert_allclose(gave[row, head], expected, rtol=0, atol=1e-4)


def picks(architecture: str, keep: int) -> list[list[set[int]]]:
    """Return which pages each kv-head of the first layer reads, token by token until the cache is full."""
    model = rewritten(architecture, KvStatic(capacity=CAPACITY, step=1), KvSelect(page_size=PAGE, selected_pages=keep))
    node = next(node for node in model.graph if node.op_type == "TopK")
    interface, name = interface_of(model), node.outputs[1].name or ""
    model.graph.outputs.append(node.outputs[1])
    stepper, found = StepRunner(model, 1, interface), []
    for token in np.random.default_rng(3).integers(0, VOCABULARY, CAPACITY):
        found.append([set(pages.tolist()) for pages in stepper.step(np.array([[token]]))[name][0]])
    return found


def test_pages_that_were_passed_over_are_picked_again() -> None:
    """Nothing is evicted: a query that reads one page and a query that reads another read them from the same states."""
    picked = [heads[0] for heads in picks("llama", 2)]
    assert all(at // PAGE in pages for at, pages in enumerate(picked))
    others = [next(iter(pages - {at // PAGE})) for at, pages in enumerate(picked) if at >= 2 * PAGE]
    assert any(
        earlier != now and now in others[:at] for at, (earlier, now) in enumerate(zip(others, others[1:], strict=False), 1)
    )


def test_pages_behind_the_window_of_a_layer_are_not_picked() -> None:
    for at, heads in enumerate(picks("mistral", 3)):
        if at >= WINDOW:
            assert all((page + 1) * PAGE - 1 > at - WINDOW for pages in heads for page in pages)


@pytest.mark.parametrize("step", [0, 1])
def test_states_bound_to_memory_give_what_states_handed_on_give(step: int, tmp_path: Path) -> None:
    model = rewritten("llama", KvStatic(capacity=CAPACITY, step=step), KvSelect(page_size=PAGE, selected_pages=3), Attention())
    check_state_binding(model, np.random.default_rng(4).integers(0, VOCABULARY, (2, 40)), step or 5, tmp_path)


def test_attention_stays_one_node_over_the_pages() -> None:
    model = rewritten("llama", KvStatic(capacity=CAPACITY, step=1), KvSelect(page_size=PAGE, selected_pages=3))
    attentions = [node for node in model.graph if node.op_type == "Attention"]
    rows = [
        value.shape[2] for node in attentions for value in node.inputs[1:3] if value is not None and value.shape is not None
    ]
    assert rows == [3 * PAGE] * 2 * len(attentions)


def test_facts_and_the_map_follow() -> None:
    model = rewritten("llama", KvStatic(capacity=CAPACITY), KvSelect(page_size=PAGE, selected_pages=3))
    assert KV_STATIC.check(model) is None
    assert "`select`" in (KV_DENSE.check(model) or "")
    told = read_kv_cache_spec(model)
    assert told is not None
    assert {layer.slots for layer in told.layers} == {CAPACITY}
    with pytest.raises(ModelError, match="depends on the queries"):
        KvSelect.torch_reference(told, single_token=True)


@pytest.mark.parametrize(
    ("options", "backend", "says", "hint"),
    [
        ({}, "onnxruntime", "0 pages of 16", "keep="),
        ({"page": 0, "keep": 1}, "onnxruntime", "pages of 0 tokens", "keep="),
        ({"page": 5, "keep": 1}, "onnxruntime", "not of whole pages of 5", "capacity=45"),
        ({"page": 4, "keep": 13}, "onnxruntime", "more than the capacity of 48", "12 pages"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_changed(options: dict[str, int], backend: str, says: str, hint: str) -> None:
    model = rewritten("llama", KvStatic(capacity=CAPACITY))
    before = ir.to_proto(model).SerializeToString()
    outcome = KvSelect(**options).rewrite(model, PassContext(backend=backend))  # type: ignore[arg-type]
    assert isinstance(outcome, Refusal)
    assert says in outcome.reason
    assert hint in (outcome.hint or "")
    assert ir.to_proto(model).SerializeToString() == before
    assert says in KvSelect(**options).estimate(model, CONTEXT).reason  # type: ignore[arg-type]


def test_tensorrt_chooses_no_more_than_it_can() -> None:
    model = rewritten("llama", KvStatic(capacity=4096))
    outcome = KvSelect(page_size=1, selected_pages=3841).rewrite(model, PassContext(backend="tensorrt-rtx"))
    assert isinstance(outcome, Refusal)
    assert "3840 pages" in outcome.reason


@pytest.mark.parametrize("score", ["bound", "cosine"])
def test_the_estimate_is_what_the_states_come_to(score: str) -> None:
    model = rewritten("llama", KvStatic(capacity=CAPACITY))
    select = KvSelect(page_size=PAGE, selected_pages=2, score=score)  # type: ignore[arg-type]
    before, estimate = state_bytes(model), select.estimate(model, CONTEXT)
    select.rewrite(model, CONTEXT)
    assert estimate.state_bytes == state_bytes(model) - before


def state_bytes(model: ir.Model) -> int:
    interface = interface_of(model)
    specs = [interface.input(state.input) for state in interface.states]
    return sum(
        int(np.prod([1 if isinstance(dim, str) else dim for dim in spec.dims or ()])) * np.dtype(spec.dtype).itemsize
        for spec in specs
    )
