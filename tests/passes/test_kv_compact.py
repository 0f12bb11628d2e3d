"""kv-compact: states hold what a slow reference holds, a prompt in one step is SnapKV's, and nothing is lost in a budget."""

from __future__ import annotations

import copy
import functools
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
from support.step_runner import StepRunner, check_state_binding
from transformers import DynamicCache

import ryzen_compile as rc
from ryzen_compile.builder.rewrite import RewriteConfig, rewrite_steps
from ryzen_compile.errors import ModelError
from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.ir.load import load
from ryzen_compile.spec.interface import Interface
from ryzen_compile.spec.kv_cache import KVCacheSpec, LayerCacheSpec, read_kv_cache_spec
from ryzen_compile.spec.passes import Change, Pass, PassContext, Refusal
from ryzen_passes.attention import Attention
from ryzen_passes.kv.compact import KvCompact
from ryzen_passes.kv.evict import KvEvict
from ryzen_passes.kv.quant import KvQuant
from ryzen_passes.kv.static import KvStatic
from ryzen_passes.properties import KV_DENSE, KV_STATIC

Array = np.ndarray[Any, Any]
STYLE, CAPACITY = "optimum-sdpa", 64
CONTEXT = PassContext(backend="onnxruntime")
NEAR = 1e-6
"""Scores that are nearer to each other than this may be in either order in float32."""


def rewritten(architecture: str, *passes: Pass, backend: str = "onnxruntime") -> ir.Model:
    model = load(export(architecture, STYLE))
    for pass_ in passes:
        outcome = pass_.rewrite(model, PassContext(backend=backend))
        assert isinstance(outcome, Change), outcome
    return model


@dataclass(frozen=True)
class Watched:
    """A rewritten graph, and what it attends with and gives at each layer, which its outputs tell."""

    model: ir.Model
    interface: Interface
    told: KVCacheSpec
    attentions: tuple[tuple[str, str, float], ...]
    """Of each layer the queries, what its attention gives, and its scale."""


@functools.cache
def watched(architecture: str, step: int, backend: str, compact: KvCompact) -> Watched:
    model = rewritten(architecture, KvStatic(capacity=CAPACITY, step=step), compact, backend=backend)
    interface, told = interface_of(model), read_kv_cache_spec(model)
    assert told is not None
    values = {value.name: value for node in model.graph for value in node.outputs}
    nodes = {node.name: node for node in model.graph}
    model.graph.outputs.extend(values[side.update] for layer in told.layers for side in (layer.key, layer.value))
    attentions = []
    for layer in told.layers:
        node = nodes[layer.attention_node]
        query = node.inputs[0]
        assert query is not None
        model.graph.outputs.extend([query, node.outputs[0]])
        scale = node.attributes.get_float("scale", layer.key.head_size**-0.5)
        attentions.append((query.name or "", node.outputs[0].name or "", scale))
    return Watched(model, interface, told, tuple(attentions))


@dataclass(frozen=True)
class Token:
    """What a slot holds."""

    position: int
    score: float
    key: Array
    value: Array


def attention(query: Array, at: int, seen: list[Token | None], scale: float, window: int | None) -> Array:
    """Return how much the query (size,) at position `at` attends to each of `seen`."""
    worth = []
    for token in seen:
        if token is None or token.position > at or (window is not None and token.position <= at - window):
            worth.append(-np.inf)
        else:
            worth.append(float(query.astype(np.float64) @ token.key.astype(np.float64)) * scale)
    weight = np.exp(np.array(worth) - max(worth))
    return weight / weight.sum()


def pooled(worth: Array, pooling: int) -> Array:
    around = np.concatenate([np.zeros(pooling // 2), worth, np.zeros(pooling // 2)])
    return np.array([sum(around[at : at + pooling]) / pooling for at in range(len(worth))])


@dataclass
class Head:
    """The slots of one kv-head of one sequence."""

    compact: KvCompact
    budget: int
    held: list[Token | None]

    def scores(self, tokens: list[Token], weights: list[Array]) -> Array:
        """Return what slots and tokens are worth, of which `weights` are the attention of the window's queries, or none."""
        everyone = [*self.held, *tokens]
        stored = np.array([0.0 if token is None else token.score for token in everyone])
        if not weights:
            return stored
        mean = np.mean(weights, axis=0)
        since = tokens[-self.compact.window].position
        inside = np.array([token is not None and token.position >= since for token in everyone])
        worth = pooled(np.where(inside, 0, mean), self.compact.pooling)
        return np.where(inside, [2 + token.position if token else 0 for token in everyone], worth)

    def wide(self, tokens: list[Token], weights: list[Array], found: dict[int, float]) -> None:
        """Take a step of a graph of any width; `found` are the scores, by position, that the graph kept."""
        everyone, worth = [*self.held, *tokens], self.scores(tokens, weights)
        keep = self.budget if weights else len(self.held)
        there = [at for at, token in enumerate(everyone) if token is not None]
        sinks = [at for at in there if everyone[at].position < self.compact.sinks]  # type: ignore[union-attr]
        others = sorted(set(there) - set(sinks), key=lambda at: (-worth[at], at))
        chosen, rest = others[: keep - len(sinks)], others[keep - len(sinks) :]
        if chosen and rest and 0 < worth[chosen[-1]] - worth[rest[0]] < NEAR:
            line = worth[chosen[-1]]
            chosen = [at for at in others if everyone[at].position in found]  # type: ignore[union-attr]
            assert len(chosen) == keep - len(sinks)
            assert all((worth[at] > line - NEAR) if at in chosen else (worth[at] < line + NEAR) for at in others)
        kept = []
        for at in sorted([*sinks, *chosen], key=lambda at: everyone[at].position):  # type: ignore[union-attr]
            token = everyone[at]
            assert token is not None
            score = found.get(token.position, np.nan)
            np.testing.assert_allclose(score, worth[at], rtol=1e-6, atol=NEAR)
            kept.append(Token(token.position, score, token.key, token.value))
        self.held = [*kept, *[None] * (len(self.held) - len(kept))]

    def single(self, token: Token) -> None:
        """Take a step of a graph of one token."""
        free = [at for at, old in enumerate(self.held) if old is None]
        may_go = [
            (old.score, at)
            for at, old in enumerate(self.held)
            if old is not None and self.compact.sinks <= old.position <= token.position - self.compact.window
        ]
        self.held[free[0] if free else min(may_go)[1]] = token


@settings(max_examples=30, deadline=None, report_multiple_bugs=False, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(data=st.data())
def test_every_slot_holds_what_the_slow_reference_holds(data: st.DataObject) -> None:
    sinks, window, spare, room = data.draw(st.sampled_from([(0, 3, 4, 2), (2, 2, 5, 4), (1, 4, 0, 1), (0, 3, 27, 4)]))
    compact = KvCompact(
        window=window,
        budget=str(sinks + window + spare),
        append_slots=room,
        sinks=sinks,
        pooling=data.draw(st.sampled_from([1, 3, 5])),
        pyramid=data.draw(st.sampled_from([1.0, 2.0])),
    )
    batch, steps = data.draw(st.integers(1, 3)), list[tuple[bool, Array]]()
    for _ in range(data.draw(st.integers(1, 7))):
        one = data.draw(st.booleans())
        for _ in range(data.draw(st.integers(1, 5)) if one else 1):
            width = 1 if one else data.draw(st.sampled_from([1, 3, 6, 17]))
            steps.append((one, np.array([[data.draw(st.integers(0, width)), width] for _ in range(batch)])))
    architecture, backend = (data.draw(st.sampled_from(names)) for names in (["llama", "mistral"], ["onnxruntime", "tensorrt"]))
    follow(compact, architecture, backend, steps, data.draw(st.integers(0, 2**32 - 1)))


def test_tokens_that_a_layer_no_longer_sees_are_told_so() -> None:
    steps = [(False, np.array([[count, 17]])) for count in (17, 12, 5, 3, 3)]
    follow(KvCompact(window=3, budget="35", append_slots=4, sinks=0, pooling=1), "mistral", "onnxruntime", steps, 0)


def follow(compact: KvCompact, architecture: str, backend: str, steps: list[tuple[bool, Array]], seed: int) -> None:
    """Hold every slot against the reference over `steps`: whether the graph of one token runs it, (tokens, width) by row."""
    graphs = {step: watched(architecture, step, backend, compact) for step in (0, 1)}
    told, batch = graphs[0].told, len(steps[0][1])
    steppers = {step: StepRunner(graph.model, batch, graph.interface) for step, graph in graphs.items()}
    states, random = steppers[0].states, np.random.default_rng(seed)
    heads = {
        (at, row, head): Head(compact, (layer.slots or 0) - compact.append_slots, [None] * (layer.slots or 0))
        for at, layer in enumerate(told.layers)
        for row in range(batch)
        for head in range(layer.kv_heads)
    }
    seen = np.zeros(batch, int)
    for one, sizes in steps:
        counts, width = sizes[:, 0], int(sizes[0, 1])
        stepper, graph = steppers[int(one)], graphs[int(one)]
        stepper.states = states
        outputs = stepper.step(
            random.integers(0, VOCABULARY, (batch, width)), (np.arange(width) < counts[:, None]).astype(np.int64)
        )
        states, firsts = stepper.states, dict[str, int]()
        after = {state.name: outputs[state.output] for state in stepper.interface.states}
        for at, layer in enumerate(graph.told.layers):
            first = firsts.get(layer.score_state or "", 0)
            firsts[layer.score_state or ""] = first + layer.kv_heads
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
                check_step(heads[at, row, head], new, graph, layer, (at, row, head), outputs, after, first + head, one=one)
        seen += counts
        assert after["length"].tolist() == seen.tolist()


def check_step(
    reference: Head,
    new: list[Token],
    graph: Watched,
    layer: LayerCacheSpec,
    which: tuple[int, int, int],
    outputs: dict[str, Array],
    after: dict[str, Array],
    place: int,
    *,
    one: bool,
) -> None:
    """Let `reference` take the step, and hold what the graph attended to and holds now against it."""
    at, row, head = which
    times = layer.heads // layer.kv_heads
    query, given, scale = graph.attentions[at]
    positions, scores = after[layer.position_state or ""][row, place], after[layer.score_state or ""][row, place]
    found = {int(position): float(score) for position, score in zip(positions, scores, strict=True) if position >= 0}
    if one and new:
        reference.single(new[0])
    before = reference.held if one else [*reference.held, *new]
    weights: list[Array] = []
    for i, token in enumerate(new):
        for own in range(head * times, (head + 1) * times):
            weight = attention(outputs[query][row, own, i], token.position, before, scale, layer.window)
            values = [np.zeros(layer.value.head_size) if other is None else other.value for other in before]
            np.testing.assert_allclose(outputs[given][row, own, i], weight @ np.array(values), rtol=0, atol=1e-5)
            if not one and i >= len(new) - reference.compact.window and len(new) >= reference.compact.window:
                weights.append(weight)
    if not one:
        reference.wide(new, weights, found)
    assert positions.tolist() == [-1 if token is None else token.position for token in reference.held]
    for slot, token in enumerate(reference.held):
        if token is not None:
            assert scores[slot] == np.float32(token.score)
            assert np.array_equal(after[layer.key.state or ""][row, head, slot], token.key)
            assert np.array_equal(after[layer.value.state or ""][row, head, slot], token.value)


@pytest.mark.parametrize("pooling", [1, 5])
def test_a_prompt_in_one_step_is_compacted_and_gone_on_from_as_snapkv_does(pooling: int) -> None:
    budget, window, length = 14, 4, 45
    passes = KvCompact(window=window, budget=str(budget), pooling=pooling, append_slots=8, sinks=0)
    prompts, singles = (StepRunner(rewritten("llama", KvStatic(capacity=CAPACITY, step=step), passes), 2) for step in (0, 1))
    ids = np.random.default_rng(3).integers(0, VOCABULARY, (2, length + 3))
    prompts.step(ids[:, :length])
    model = copy.deepcopy(module("llama", "eager")).double()
    cache, kept = DynamicCache(config=model.config), []
    with torch.no_grad():
        out = model(torch.from_numpy(ids[:, :length]), past_key_values=cache, use_cache=True, output_attentions=True)
        for layer, weights in zip(cache.layers, out.attentions, strict=True):
            # As in the paper's listing, and the mean over the queries of a group.
            worth = weights[:, :, -window:, :-window].sum(dim=2)
            worth = torch.nn.functional.avg_pool1d(worth, pooling, padding=pooling // 2, stride=1)
            worth = worth.unflatten(1, (layer.keys.shape[1], -1)).mean(dim=2)
            prefix = worth.topk(budget - window, dim=-1).indices.sort(dim=-1).values
            index = torch.cat([prefix, torch.arange(length - window, length).expand(*prefix.shape[:2], -1)], dim=-1)
            kept.append(index)
            rows = index[..., None].expand(*index.shape, layer.keys.shape[3])
            layer.keys, layer.values = layer.keys.gather(2, rows), layer.values.gather(2, rows)
        positions = prompts.states["past_position"]
        np.testing.assert_array_equal(positions[:, :, :budget], torch.cat(kept, dim=1).numpy())
        assert (positions[:, :, budget:] == -1).all()
        singles.states = prompts.states
        for at in range(length, length + 3):
            token = torch.from_numpy(ids[:, at : at + 1])
            there = torch.ones(2, budget + at - length + 1, dtype=torch.int64)
            out = model(token, past_key_values=cache, position_ids=torch.full_like(token, at), attention_mask=there)
            np.testing.assert_allclose(singles.step(token.numpy())["logits"], out.logits.numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2", "falcon"])
@pytest.mark.parametrize("step", [0, 1])
def test_nothing_is_lost_within_the_budget(architecture: str, step: int) -> None:
    compact = KvCompact(budget="50%", sinks=2, window=6, append_slots=8)
    model = rewritten(architecture, KvStatic(capacity=80, step=step), compact, Attention())
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (2, 40))
    chunks = [1] * 40 if step else [7, 1, 12, *[1] * 20]
    stepper, logits, at = StepRunner(model, 2), [], 0
    for chunk in chunks:
        logits.append(stepper.step(ids[:, at : at + chunk])["logits"])
        at += chunk
    np.testing.assert_allclose(np.concatenate(logits, axis=1), torch_steps(architecture, ids, chunks), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("step", "backend"), [(0, "onnxruntime"), (1, "onnxruntime"), (1, "tensorrt")])
def test_states_bound_to_memory_give_what_states_handed_on_give(step: int, backend: str, tmp_path: Path) -> None:
    compact = KvCompact(budget="12", sinks=2, window=4, append_slots=5)
    model = rewritten("llama", KvStatic(capacity=CAPACITY, step=step), compact, Attention(), backend=backend)
    check_state_binding(model, np.random.default_rng(4).integers(0, VOCABULARY, (2, 40)), step or 5, tmp_path)


def test_one_package_feeds_prompts_by_one_graph_and_generates_by_the_other(tmp_path: Path) -> None:
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
        (found,) = engine.generate(ids, max_new_tokens=20, chunk=10)
    assert found.tokens.tolist() == expected


TARGETS = ("sm86", "sm89", "sm120")


@pytest.mark.parametrize(("architecture", "pyramid"), [("llama", 1), ("llama", 2), ("mistral", 1)])
def test_both_graphs_build_with_fused_attention_and_half_states(architecture: str, pyramid: int, tmp_path: Path) -> None:
    passes = f"kv-static{{capacity={CAPACITY}}},kv-compact{{budget=25%,window=8,append-slots=8,sinks=2,pyramid={pyramid}}}"
    rewrite_steps(export(architecture, STYLE), tmp_path / "decode", RewriteConfig(passes=passes), (1, 16, 0))
    package = rc.build(tmp_path / "decode", gpu=",".join(TARGETS), precision="fp16", compare=False, cache=False)
    assert not package.manifest.refused_targets
    built = {(engine.graph, str(target)) for engine in package.manifest.engines for target in engine.targets}
    assert built == {(graph, target) for graph in ("step-1", "step-16", "step-any") for target in TARGETS}
    for engine in package.manifest.engines:
        assert engine.layers is not None
        assert [one.fused for one in engine.layers.attentions] == [True] * LAYERS
    caches = {f"past_key_values.{layer}.{kind}" for layer in range(LAYERS) for kind in ("key", "value")}
    others = {"score", "position"} if pyramid == 1 else {f"{name}.{at}" for name in ("score", "position") for at in (0, 1)}
    for graph in package.manifest.graphs:
        assert {state.name for state in graph.interface.states} == {*caches, "length", *others}
        (variant,) = (one for one in graph.variants if not one.portable)
        assert variant.state_dtypes == dict.fromkeys(caches, "float16")


def test_facts_and_the_map_follow() -> None:
    model = rewritten("llama", KvStatic(capacity=CAPACITY), KvCompact(budget="16", window=8, append_slots=8))
    assert KV_STATIC.check(model) is None
    assert "by `snapkv`" in (KV_DENSE.check(model) or "")
    told = read_kv_cache_spec(model)
    assert told is not None
    assert {(layer.slots, layer.sinks, layer.recent_window) for layer in told.layers} == {(24, 4, 8)}
    assert KV_DENSE in KvEvict.requires & KvCompact.requires & KvCompact.invalidates
    with pytest.raises(ModelError, match="depends on the queries"):
        KvCompact.torch_reference(told, single_token=True)


def test_codes_behind_it_are_refused_for_prompts() -> None:
    model = rewritten("llama", KvStatic(capacity=CAPACITY), KvCompact(budget="16", window=8, append_slots=8))
    outcome = KvQuant(keys="8", values="8").rewrite(model, CONTEXT)
    assert isinstance(outcome, Refusal)
    assert "not written as" in outcome.reason


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"budget": "11"}, "less than 4 sinks and a window of 8"),
        ({"budget": "57"}, "more than the capacity of 64"),
        ({"budget": "1KB"}, "less than"),
        ({"budget": "half"}, "no budget"),
        ({"window": 1}, "cannot be"),
        ({"room": 0}, "cannot be"),
        ({"sinks": -1}, "cannot be"),
        ({"pooling": 4}, "cannot be"),
        ({"pooling": 0}, "cannot be"),
        ({"pyramid": 0.5}, "cannot be"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_changed(options: dict[str, Any], says: str) -> None:
    model, compact = (
        rewritten("llama", KvStatic(capacity=CAPACITY)),
        KvCompact(**{"budget": "20", "window": 8, "room": 8, **options}),
    )
    before = ir.to_proto(model).SerializeToString()
    outcome = compact.rewrite(model, CONTEXT)
    assert isinstance(outcome, Refusal)
    assert says in outcome.reason
    assert outcome.hint
    assert ir.to_proto(model).SerializeToString() == before
    assert says in compact.estimate(model, CONTEXT).reason


def test_steps_that_hold_no_window_are_refused() -> None:
    outcome = KvCompact(budget="20", window=8, append_slots=8).rewrite(
        rewritten("llama", KvStatic(capacity=CAPACITY, step=7)), CONTEXT
    )
    assert isinstance(outcome, Refusal)
    assert "a step of 7 tokens holds no window of 8" in outcome.reason


def test_growing_caches_are_refused() -> None:
    outcome = KvCompact().rewrite(load(export("llama", STYLE)), CONTEXT)
    assert isinstance(outcome, Refusal)
    assert "kv-static" in (outcome.hint or "")


def test_tensorrt_chooses_from_no_more_slots_than_it_can() -> None:
    static = KvStatic(capacity=8192)
    outcome = KvCompact(budget="3800", append_slots=41).rewrite(rewritten("llama", static), PassContext(backend="tensorrt-rtx"))
    assert isinstance(outcome, Refusal)
    assert "3841 slots a head are more than the 3840" in outcome.reason
    one = KvStatic(capacity=8192, step=1)
    assert isinstance(
        KvCompact(budget="3800", append_slots=41).rewrite(rewritten("llama", one), PassContext(backend="tensorrt-rtx")), Change
    )


@pytest.mark.parametrize("options", [{"budget": "20"}, {"budget": "20", "pyramid": 2.0}, {"budget": "12KB"}])
def test_the_estimate_is_what_the_states_come_to(options: dict[str, Any]) -> None:
    model = rewritten("llama", KvStatic(capacity=CAPACITY))
    compact = KvCompact(window=8, append_slots=8, **options)
    before, estimate = state_bytes(model), compact.estimate(model, CONTEXT)
    compact.rewrite(model, CONTEXT)
    assert estimate.state_bytes == state_bytes(model) - before
    if options["budget"] == "12KB":
        assert 0 < 12_000 - state_bytes(model) < 4 * (2 * 16 * 4 + 8)


def state_bytes(model: ir.Model) -> int:
    interface = interface_of(model)
    specs = [interface.input(state.input) for state in interface.states]
    return sum(
        int(np.prod([1 if isinstance(dim, str) else dim for dim in spec.dims or ()])) * np.dtype(spec.dtype).itemsize
        for spec in specs
    )
