"""kv-compact: states equal a slow reference, a prompt in one step equals SnapKV, and the rewrite is exact within the budget."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support.decoders import LAYERS, VOCABULARY, export, module, torch_steps
from support.examples import examples
from support.rewritten_decoders import InstrumentedDecoder, instrumented, rewritten
from support.step_runner import StepRunner, check_state_binding, state_bytes
from transformers import DynamicCache

import ryzen_compile as rc
from ryzen_compile.builder.rewrite import RewriteConfig, rewrite_steps
from ryzen_compile.errors import ModelError
from ryzen_compile.ir.load import load
from ryzen_compile.spec.kv_cache import LayerCacheSpec, read_kv_cache_spec
from ryzen_compile.spec.passes import Change, PassContext, Refusal
from ryzen_passes.attention import Attention
from ryzen_passes.kv.compact import KvCompact
from ryzen_passes.kv.evict import KvEvict
from ryzen_passes.kv.quant import KvQuant
from ryzen_passes.kv.static import KvStatic
from ryzen_passes.properties import KV_DENSE, KV_STATIC

Array = np.ndarray[Any, Any]
STYLE, CAPACITY = "optimum-sdpa", 64
CONTEXT = PassContext(backend="onnxruntime")
TOLERANCE = 1e-6
"""Scores that differ by less than this may be in either order in float32."""


@dataclass(frozen=True)
class Token:
    """The token in a slot."""

    position: int
    score: float
    key: Array
    value: Array


def attention(query: Array, position: int, tokens: list[Token | None], scale: float, window: int | None) -> Array:
    """Return the attention weights of `query` (head_size,) at `position` over `tokens`."""
    logits = []
    for token in tokens:
        if token is None or token.position > position or (window is not None and token.position <= position - window):
            logits.append(-np.inf)
        else:
            logits.append(float(query.astype(np.float64) @ token.key.astype(np.float64)) * scale)
    weight = np.exp(np.array(logits) - max(logits))
    return weight / weight.sum()


def pooled(weights: Array, pooling: int) -> Array:
    padded = np.concatenate([np.zeros(pooling // 2), weights, np.zeros(pooling // 2)])
    return np.array([sum(padded[start : start + pooling]) / pooling for start in range(len(weights))])


@dataclass
class ReferenceHead:
    """The slots of one kv-head of one sequence, in plain Python."""

    compact: KvCompact
    budget: int
    slots: list[Token | None]
    attention_window: int | None

    def scores(self, tokens: list[Token], weights: list[Array]) -> Array:
        """Return the scores of slots and tokens; `weights`: attention of the window's queries, empty without compaction."""
        entries = [*self.slots, *tokens]
        stored = np.array([0.0 if token is None else token.score for token in entries])
        if not weights:
            return stored
        mean = np.mean(weights, axis=0)
        window_start = tokens[-self.compact.window].position
        in_window = np.array([token is not None and token.position >= window_start for token in entries])
        averaged = pooled(np.where(in_window, 0, mean), self.compact.pooling)
        return np.where(in_window, [2 + token.position if token else 0 for token in entries], averaged)

    def append_step(self, tokens: list[Token], weights: list[Array], stored_scores: dict[int, float]) -> None:
        """Append a step of several tokens; `stored_scores` are the scores in the graph's state, by position."""
        entries, scores = [*self.slots, *tokens], self.scores(tokens, weights)
        keep = self.budget if weights else len(self.slots)
        occupied = [at for at, token in enumerate(entries) if token is not None]
        sinks = [at for at in occupied if entries[at].position < self.compact.sinks]  # type: ignore[union-attr]
        ranked = sorted(set(occupied) - set(sinks), key=lambda at: (-scores[at], at))
        chosen, rest = ranked[: keep - len(sinks)], ranked[keep - len(sinks) :]
        if chosen and rest and 0 < scores[chosen[-1]] - scores[rest[0]] < TOLERANCE:
            threshold = scores[chosen[-1]]
            chosen = [at for at in ranked if entries[at].position in stored_scores]  # type: ignore[union-attr]
            assert len(chosen) == keep - len(sinks)
            assert all(
                (scores[at] > threshold - TOLERANCE) if at in chosen else (scores[at] < threshold + TOLERANCE) for at in ranked
            )
        kept_tokens = []
        for at in sorted([*sinks, *chosen], key=lambda at: entries[at].position):  # type: ignore[union-attr]
            token = entries[at]
            assert token is not None
            score = stored_scores.get(token.position, np.nan)
            np.testing.assert_allclose(score, scores[at], rtol=1e-6, atol=TOLERANCE)
            kept_tokens.append(Token(token.position, score, token.key, token.value))
        self.slots = [*kept_tokens, *[None] * (len(self.slots) - len(kept_tokens))]

    def append_token(self, token: Token) -> None:
        """Append a step of one token."""
        unseen_until = token.position - (self.attention_window or token.position + 1)
        free = [at for at, old in enumerate(self.slots) if old is None or old.position <= unseen_until]
        candidates = [
            (old.score, at)
            for at, old in enumerate(self.slots)
            if old is not None and self.compact.sinks <= old.position <= token.position - self.compact.window
        ]
        self.slots[free[0] if free else min(candidates)[1]] = token


@settings(
    max_examples=examples(15), deadline=None, report_multiple_bugs=False, phases=(Phase.explicit, Phase.reuse, Phase.generate)
)
@given(data=st.data())
def test_every_slot_equals_the_reference(data: st.DataObject) -> None:
    sinks, window, extra, append_slots = data.draw(st.sampled_from([(0, 3, 4, 2), (2, 2, 5, 4), (1, 4, 0, 1), (0, 3, 27, 4)]))
    compact = KvCompact(
        window=window,
        budget=str(sinks + window + extra),
        append_slots=append_slots,
        sinks=sinks,
        pooling=data.draw(st.sampled_from([1, 3, 5])),
        pyramid=data.draw(st.sampled_from([1.0, 2.0])),
    )
    batch, steps = data.draw(st.integers(1, 3)), list[tuple[bool, Array]]()
    for _ in range(data.draw(st.integers(1, 7))):
        single_token = data.draw(st.booleans())
        for _ in range(data.draw(st.integers(1, 5)) if single_token else 1):
            step_size = 1 if single_token else data.draw(st.sampled_from([1, 3, 6, 17]))
            steps.append((single_token, np.array([[data.draw(st.integers(0, step_size)), step_size] for _ in range(batch)])))
    architecture, backend = (data.draw(st.sampled_from(names)) for names in (["llama", "mistral"], ["onnxruntime", "tensorrt"]))
    check_against_reference(compact, architecture, backend, steps, data.draw(st.integers(0, 2**32 - 1)))


def test_tokens_outside_the_attention_window_get_no_attention() -> None:
    steps = [(False, np.array([[count, 17]])) for count in (17, 12, 5, 3, 3)]
    check_against_reference(
        KvCompact(window=3, budget="35", append_slots=4, sinks=0, pooling=1), "mistral", "onnxruntime", steps, 0
    )


def check_against_reference(
    compact: KvCompact, architecture: str, backend: str, steps: list[tuple[bool, Array]], seed: int
) -> None:
    """Compare every slot with the reference after each of `steps`: (single-token graph?, (tokens, step size) per row)."""
    graphs = {
        step: instrumented(architecture, KvStatic(ring_buffers=False, capacity=CAPACITY, step=step), compact, backend=backend)
        for step in (0, 1)
    }
    spec, batch = graphs[0].spec, len(steps[0][1])
    runners = {step: StepRunner(graph.model, batch, graph.interface) for step, graph in graphs.items()}
    states, random = runners[0].states, np.random.default_rng(seed)
    heads = {
        (index, row, head): ReferenceHead(
            compact, layer.policy.slots - compact.append_slots, [None] * layer.policy.slots, layer.window
        )
        for index, layer in enumerate(spec.layers)
        for row in range(batch)
        for head in range(layer.kv_heads)
    }
    seen = np.zeros(batch, int)
    for single_token, sizes in steps:
        counts, step_size = sizes[:, 0], int(sizes[0, 1])
        runner, graph = runners[int(single_token)], graphs[int(single_token)]
        runner.states = states
        outputs = runner.step(
            random.integers(0, VOCABULARY, (batch, step_size)), (np.arange(step_size) < counts[:, None]).astype(np.int64)
        )
        states, first_rows = runner.states, dict[str, int]()
        after = {state.name: outputs[state.output] for state in runner.interface.states}
        for index, layer in enumerate(graph.spec.layers):
            first_row = first_rows.get(layer.policy.score_state, 0)
            first_rows[layer.policy.score_state] = first_row + layer.kv_heads
            for row, head in np.ndindex(batch, layer.kv_heads):
                new = [
                    Token(
                        int(seen[row]) + n,
                        float(seen[row]) + n + 2,
                        outputs[layer.key.update][row, head, n],
                        outputs[layer.value.update][row, head, n],
                    )
                    for n in range(counts[row])
                ]
                check_step(
                    heads[index, row, head],
                    new,
                    graph,
                    layer,
                    (index, row, head),
                    outputs,
                    after,
                    first_row + head,
                    single_token=single_token,
                )
        seen += counts
        assert after["length"].tolist() == seen.tolist()


def check_step(
    reference: ReferenceHead,
    new: list[Token],
    graph: InstrumentedDecoder,
    layer: LayerCacheSpec,
    layer_row_head: tuple[int, int, int],
    outputs: dict[str, Array],
    after: dict[str, Array],
    state_row: int,
    *,
    single_token: bool,
) -> None:
    """Append the step to `reference`, and compare attention outputs and slots of the graph with it."""
    index, row, head = layer_row_head
    times = layer.heads // layer.kv_heads
    query, _, _, output, scale = graph.layers[index]
    positions, scores = after[layer.policy.position_state][row, state_row], after[layer.policy.score_state][row, state_row]
    stored_scores = {int(position): float(score) for position, score in zip(positions, scores, strict=True) if position >= 0}
    if single_token and new:
        reference.append_token(new[0])
    before = reference.slots if single_token else [*reference.slots, *new]
    weights: list[Array] = []
    for i, token in enumerate(new):
        for query_head in range(head * times, (head + 1) * times):
            weight = attention(outputs[query][row, query_head, i], token.position, before, scale, layer.window)
            values = [np.zeros(layer.value.head_size) if other is None else other.value for other in before]
            np.testing.assert_allclose(outputs[output][row, query_head, i], weight @ np.array(values), rtol=0, atol=1e-5)
            if not single_token and i >= len(new) - reference.compact.window and len(new) >= reference.compact.window:
                weights.append(weight)
    if not single_token:
        reference.append_step(new, weights, stored_scores)
    assert positions.tolist() == [-1 if token is None else token.position for token in reference.slots]
    for slot, token in enumerate(reference.slots):
        if token is not None:
            assert scores[slot] == np.float32(token.score)
            assert np.array_equal(after[layer.key.state or ""][row, head, slot], token.key)
            assert np.array_equal(after[layer.value.state or ""][row, head, slot], token.value)


@pytest.mark.parametrize("pooling", [1, 5])
def test_a_prompt_in_one_step_and_its_continuation_equal_snapkv(pooling: int) -> None:
    budget, window, length = 14, 4, 45
    passes = KvCompact(window=window, budget=str(budget), pooling=pooling, append_slots=8, sinks=0)
    prompts, singles = (StepRunner(rewritten("llama", KvStatic(capacity=CAPACITY, step=step), passes), 2) for step in (0, 1))
    ids = np.random.default_rng(3).integers(0, VOCABULARY, (2, length + 3))
    prompts.step(ids[:, :length])
    model = copy.deepcopy(module("llama", "eager")).double()
    cache, kept_tokens = DynamicCache(config=model.config), []
    with torch.no_grad():
        out = model(torch.from_numpy(ids[:, :length]), past_key_values=cache, use_cache=True, output_attentions=True)
        for layer, weights in zip(cache.layers, out.attentions, strict=True):
            # The listing of the paper, with the mean over the query heads of a group.
            scores = weights[:, :, -window:, :-window].sum(dim=2)
            scores = torch.nn.functional.avg_pool1d(scores, pooling, padding=pooling // 2, stride=1)
            scores = scores.unflatten(1, (layer.keys.shape[1], -1)).mean(dim=2)
            prefix = scores.topk(budget - window, dim=-1).indices.sort(dim=-1).values
            index = torch.cat([prefix, torch.arange(length - window, length).expand(*prefix.shape[:2], -1)], dim=-1)
            kept_tokens.append(index)
            rows = index[..., None].expand(*index.shape, layer.keys.shape[3])
            layer.keys, layer.values = layer.keys.gather(2, rows), layer.values.gather(2, rows)
        positions = prompts.states["past_position"]
        np.testing.assert_array_equal(positions[:, :, :budget], torch.cat(kept_tokens, dim=1).numpy())
        assert (positions[:, :, budget:] == -1).all()
        singles.states = prompts.states
        for at in range(length, length + 3):
            token = torch.from_numpy(ids[:, at : at + 1])
            occupied = torch.ones(2, budget + at - length + 1, dtype=torch.int64)
            out = model(token, past_key_values=cache, position_ids=torch.full_like(token, at), attention_mask=occupied)
            np.testing.assert_allclose(singles.step(token.numpy())["logits"], out.logits.numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2", "falcon"])
@pytest.mark.parametrize("step", [0, 1])
def test_exact_within_the_budget(architecture: str, step: int) -> None:
    compact = KvCompact(budget="50%", sinks=2, window=6, append_slots=8)
    model = rewritten(architecture, KvStatic(ring_buffers=False, capacity=80, step=step), compact, Attention())
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (2, 40))
    chunks = [1] * 40 if step else [7, 1, 12, *[1] * 20]
    runner, logits, at = StepRunner(model, 2), [], 0
    for chunk in chunks:
        logits.append(runner.step(ids[:, at : at + chunk])["logits"])
        at += chunk
    np.testing.assert_allclose(np.concatenate(logits, axis=1), torch_steps(architecture, ids, chunks), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("step", "backend"), [(0, "onnxruntime"), (1, "onnxruntime"), (1, "tensorrt")])
def test_bound_states_equal_states_passed_by_value(step: int, backend: str, tmp_path: Path) -> None:
    compact = KvCompact(budget="12", sinks=2, window=4, append_slots=5)
    model = rewritten("llama", KvStatic(capacity=CAPACITY, step=step), compact, Attention(), backend=backend)
    check_state_binding(model, np.random.default_rng(4).integers(0, VOCABULARY, (2, 40)), step or 5, tmp_path)


def test_a_package_uses_one_graph_for_prompts_and_one_for_generation(tmp_path: Path) -> None:
    passes = f"kv-static{{capacity={CAPACITY}}},kv-compact{{budget=16,window=4,append-slots=6,sinks=1}}"
    rewrite_steps(export("llama", STYLE), tmp_path / "decode", RewriteConfig(passes=passes), (1, 0))
    package = rc.build(tmp_path / "decode", gpu="cpu", compare=False, cache=False)
    compact = KvCompact(budget="16", window=4, append_slots=6, sinks=1)
    prompts, singles = (StepRunner(rewritten("llama", KvStatic(capacity=CAPACITY, step=step), compact), 1) for step in (0, 1))
    ids, expected = np.random.default_rng(5).integers(0, VOCABULARY, 50), []
    for at in range(0, 50, 10):
        logits = prompts.step(ids[None, at : at + 10])["logits"]
    singles.states = prompts.states
    for _ in range(20):
        expected.append(int(logits[0, -1].argmax()))
        logits = singles.step(np.array([expected[-1:]]))["logits"]
    with rc.load(package.path) as engine:
        (generation,) = engine.generate(ids, max_new_tokens=20, chunk=10)
    assert generation.tokens.tolist() == expected


TARGETS = ("sm86", "sm89", "sm120")


@pytest.mark.parametrize(
    ("architecture", "budget", "pyramid"),
    [("llama", 16, 1), ("llama", 16, 2), pytest.param("mistral", 12, 1, marks=pytest.mark.exhaustive)],
)
def test_all_graphs_build_with_fused_attention_and_fp16_states(
    architecture: str, budget: int, pyramid: int, tmp_path: Path
) -> None:
    """With the budget of Mistral, a layer has fewer slots than the ring buffer of its attention window, and is compacted."""
    passes = f"kv-static{{capacity={CAPACITY}}},kv-compact{{budget={budget},window=8,append-slots=8,sinks=2,pyramid={pyramid}}}"
    rewrite_steps(export(architecture, STYLE), tmp_path / "decode", RewriteConfig(passes=passes), (1, 16, 0))
    package = rc.build(tmp_path / "decode", gpu=",".join(TARGETS), precision="fp16", compare=False, cache=False)
    assert not package.manifest.refused_targets
    built = {(engine.graph, str(target)) for engine in package.manifest.engines for target in engine.targets}
    assert built == {(graph, target) for graph in ("step-1", "step-16", "step-any") for target in TARGETS}
    for engine in package.manifest.engines:
        assert engine.layers is not None
        assert [fusion.fused for fusion in engine.layers.attentions] == [True] * LAYERS
    caches = {f"past_key_values.{layer}.{kind}" for layer in range(LAYERS) for kind in ("key", "value")}
    other_states = (
        {"score", "position"} if pyramid == 1 else {f"{name}.{at}" for name in ("score", "position") for at in (0, 1)}
    )
    for graph in package.manifest.graphs:
        assert {state.name for state in graph.interface.states} == {*caches, "length", *other_states}
        (variant,) = (candidate for candidate in graph.variants if not candidate.portable)
        assert variant.state_dtypes == dict.fromkeys(caches, "float16")


def test_properties_and_specification_follow() -> None:
    model = rewritten("llama", KvStatic(capacity=CAPACITY), KvCompact(budget="16", window=8, append_slots=8))
    assert KV_STATIC.check(model) is None
    assert "method `snapkv`" in (KV_DENSE.check(model) or "")
    spec = read_kv_cache_spec(model)
    assert spec is not None
    assert {(layer.policy.slots, layer.policy.sinks, layer.policy.recent_window) for layer in spec.layers} == {(24, 4, 8)}
    assert KV_DENSE in KvEvict.requires & KvCompact.requires & KvCompact.invalidates
    with pytest.raises(ModelError, match="depends on the queries"):
        KvCompact.torch_cache_factory(spec, single_token=True)


def test_quantization_after_it_is_refused_for_prompts() -> None:
    model = rewritten("llama", KvStatic(capacity=CAPACITY), KvCompact(budget="16", window=8, append_slots=8))
    outcome = KvQuant(keys="8", values="8").rewrite(model, CONTEXT)
    assert isinstance(outcome, Refusal)
    assert "not written by kv-static or kv-evict" in outcome.reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "11"}, "of 11 tokens is less than `sinks` 4 + `window` 8"),
        ({"budget": "57"}, "of 57 tokens + `append-slots` 8 exceed the capacity of 64"),
        ({"budget": "1KB"}, "is less than `sinks` 4 + `window` 8"),
        ({"budget": "half"}, "got `half`"),
        ({"window": 1}, "`window` must be at least 2 (got 1)"),
        ({"append_slots": 0}, "`append-slots` must be at least 1 (got 0)"),
        ({"sinks": -1}, "`sinks` must be at least 0 (got -1)"),
        ({"pooling": 4}, "`pooling` must be an odd number of at least 1 (got 4)"),
        ({"pooling": 0}, "`pooling` must be an odd number of at least 1 (got 0)"),
        ({"pyramid": 0.5}, "`pyramid` must be at least 1 (got 0.5)"),
    ],
)
def test_invalid_options_are_refused_and_leave_the_model_unchanged(options: dict[str, Any], message: str) -> None:
    model, compact = (
        rewritten("llama", KvStatic(capacity=CAPACITY)),
        KvCompact(**{"budget": "20", "window": 8, "append_slots": 8, **options}),
    )
    before = ir.to_proto(model).SerializeToString()
    outcome = compact.rewrite(model, CONTEXT)
    assert isinstance(outcome, Refusal)
    assert message in outcome.reason
    assert outcome.hint
    assert ir.to_proto(model).SerializeToString() == before
    assert message in compact.estimate(model, CONTEXT).reason


def test_steps_smaller_than_the_window_are_refused() -> None:
    outcome = KvCompact(budget="20", window=8, append_slots=8).rewrite(
        rewritten("llama", KvStatic(capacity=CAPACITY, step=7)), CONTEXT
    )
    assert isinstance(outcome, Refusal)
    assert "`window` 8 exceeds the step size of 7 tokens" in outcome.reason


def test_growing_caches_are_refused() -> None:
    outcome = KvCompact().rewrite(load(export("llama", STYLE)), CONTEXT)
    assert isinstance(outcome, Refusal)
    assert "kv-static" in (outcome.hint or "")


def test_tensorrt_limits_the_number_of_slots() -> None:
    static = KvStatic(capacity=8192)
    outcome = KvCompact(budget="3800", append_slots=41).rewrite(rewritten("llama", static), PassContext(backend="tensorrt-rtx"))
    assert isinstance(outcome, Refusal)
    assert "3841 slots per head exceed the maximum of 3840" in outcome.reason
    decode = KvStatic(capacity=8192, step=1)
    assert isinstance(
        KvCompact(budget="3800", append_slots=41).rewrite(rewritten("llama", decode), PassContext(backend="tensorrt-rtx")),
        Change,
    )


@pytest.mark.parametrize("options", [{"budget": "20"}, {"budget": "20", "pyramid": 2.0}, {"budget": "12KB"}])
def test_estimate_equals_the_change_in_state_bytes(options: dict[str, Any]) -> None:
    model = rewritten("llama", KvStatic(capacity=CAPACITY))
    compact = KvCompact(window=8, append_slots=8, **options)
    before, estimate = state_bytes(model), compact.estimate(model, CONTEXT)
    compact.rewrite(model, CONTEXT)
    assert estimate.state_bytes == state_bytes(model) - before
    if options["budget"] == "12KB":
        assert 0 < 12_000 - state_bytes(model) < 4 * (2 * 16 * 4 + 8)
