"""kv-window: logits and slots equal a StreamingLLM reference, token by token and for any division into steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.decoders import ARCHITECTURES, VOCABULARY, export, module, torch_steps
from support.examples import examples
from support.rewritten_decoders import InstrumentedDecoder, instrumented, rewritten
from support.step_runner import StepRunner, check_state_binding, state_bytes
from transformers.cache_utils import Cache, CacheLayerMixin

from ryzen_compile.errors import ModelError
from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.ir.load import load
from ryzen_compile.spec.kv_cache import read_kv_cache_spec
from ryzen_compile.spec.passes import PassContext, Refusal
from ryzen_passes.attention import Attention
from ryzen_passes.kv.static import KvStatic
from ryzen_passes.kv.window import KvWindow
from ryzen_passes.properties import KV_DENSE, KV_STATIC

Array = np.ndarray[Any, Any]
STYLE = "optimum-sdpa"
CAPACITY = 64
CONTEXT = PassContext(backend="onnxruntime")
ROPE_ARCHITECTURES = ("llama", "mistral", "gptj", "gpt-neox")


def rotated(architecture: str, keys: Array, positions: Array) -> Array:
    """Return `keys` (..., tokens, head_size) rotated by `positions` (tokens,) as the configuration defines it; float64."""
    options = ARCHITECTURES[architecture][1]
    rope = options.get("rope_parameters", {})
    size = options.get("rotary_dim", int(keys.shape[-1] * rope.get("partial_rotary_factor", 1)))
    angle = np.asarray(positions)[:, None] * 10000.0 ** -(np.arange(0, size, 2) / size)
    interleaved = architecture == "gptj"
    first, second = (
        (np.arange(0, size, 2), np.arange(1, size, 2)) if interleaved else (np.arange(size // 2), np.arange(size // 2, size))
    )
    rotated_keys = np.asarray(keys, np.float64).copy()
    rotated_keys[..., first] = keys[..., first] * np.cos(angle) - keys[..., second] * np.sin(angle)
    rotated_keys[..., second] = keys[..., second] * np.cos(angle) + keys[..., first] * np.sin(angle)
    return rotated_keys


class StreamingCacheLayer(CacheLayerMixin):  # type: ignore[misc]
    """A Transformers cache layer of unrotated keys; the position of a token is its index in the cache."""

    def __init__(self, architecture: str, sinks: int, window: int) -> None:
        super().__init__()
        self.architecture, self.sinks, self.slots, self.seen_tokens = architecture, sinks, sinks + window, 0
        self.is_initialized = True
        self.unrotated_keys: list[Array] = []
        self.values: list[torch.Tensor] = []

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise NotImplementedError

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        assert key_states.shape[2] == 1
        self.unrotated_keys.append(rotated(self.architecture, key_states.numpy(), np.array([-self.get_seq_length()])))
        self.values.append(value_states)
        self.seen_tokens += 1
        if len(self.values) > self.slots:
            del self.unrotated_keys[self.sinks], self.values[self.sinks]
        keys = rotated(self.architecture, np.concatenate(self.unrotated_keys, axis=2), np.arange(len(self.unrotated_keys)))
        return torch.from_numpy(keys.astype(np.float32)), torch.cat(self.values, dim=2)

    def get_seq_length(self) -> int:
        return min(self.seen_tokens, self.slots - 1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


def reference_logits(architecture: str, ids: Array, sinks: int, window: int) -> Array:
    """Return the module's logits (batch, tokens, vocabulary), token by token over `StreamingCacheLayer` caches."""
    model, logits = module(architecture), []
    cache = Cache(layers=[StreamingCacheLayer(architecture, sinks, window) for _ in range(model.config.num_hidden_layers)])
    with torch.no_grad():
        for start in range(ids.shape[1]):
            position = torch.full((len(ids), 1), cache.get_seq_length())
            output = model(
                torch.from_numpy(ids[:, start : start + 1]), past_key_values=cache, use_cache=True, position_ids=position
            )
            logits.append(output.logits.numpy())
    return np.concatenate(logits, axis=1)


def graph_logits(model: ir.Model, ids: Array, chunks: list[int]) -> Array:
    return StepRunner(model, len(ids)).logits(ids, chunks)


def random_ids(tokens: int, batch: int = 2) -> Array:
    return np.random.default_rng(5).integers(0, VOCABULARY, (batch, tokens))


@pytest.mark.parametrize("architecture", ROPE_ARCHITECTURES)
@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize(("sinks", "window"), [(4, 8), (4, 22), (0, 5)])
def test_logits_equal_a_cache_that_renumbers_positions(architecture: str, step: int, sinks: int, window: int) -> None:
    ids = random_ids(60)
    model = rewritten(architecture, KvStatic(capacity=CAPACITY, step=step), KvWindow(sinks=sinks, window=window), Attention())
    chunks = [1] * 60 if step else [3, 1, 11, *[1] * 5, 25, 15]
    expected = reference_logits(architecture, ids, sinks, window)
    np.testing.assert_allclose(graph_logits(model, ids, chunks), expected, rtol=0, atol=1e-4)
    full_logits = torch_steps(architecture, ids, [60])
    assert np.abs(expected - full_logits)[:, : sinks + window].max() < 1e-4 < np.abs(expected - full_logits)[:, -1].max()


@pytest.mark.parametrize("style", ["genai", "optimum-eager"])
def test_rotations_of_other_exporters_are_equivalent(style: str) -> None:
    ids = random_ids(40)
    model = rewritten("llama", KvStatic(capacity=CAPACITY, step=1), KvWindow(sinks=2, window=9), Attention(), style=style)
    np.testing.assert_allclose(graph_logits(model, ids, [1] * 40), reference_logits("llama", ids, 2, 9), rtol=0, atol=1e-4)


@pytest.mark.parametrize("step", [0, 1])
def test_rows_of_different_lengths_are_independent(step: int) -> None:
    model, ids = rewritten("llama", KvStatic(capacity=CAPACITY, step=step), KvWindow(sinks=2, window=6)), random_ids(40, 3)
    random, seen_tokens, counts = np.random.default_rng(6), np.zeros(3, int), []
    for _ in range(40 if step else 9):
        step_size = step or int(random.integers(1, 10))
        counts.append(np.minimum(random.integers(0, step_size + 1, 3), 40 - seen_tokens).tolist())
        seen_tokens += counts[-1]
    assert (seen_tokens > 12).all()
    for row, logits in enumerate(StepRunner(model, 3).ragged_logits(ids, counts)):
        assert len(logits) == seen_tokens[row]
        alone = reference_logits("llama", ids[row : row + 1, : len(logits)], 2, 6)[0]
        np.testing.assert_allclose(logits, alone, rtol=0, atol=1e-4)


def instrumented_gptj(step: int, sinks: int, window: int) -> InstrumentedDecoder:
    return instrumented("gptj", KvStatic(capacity=CAPACITY, step=step), KvWindow(sinks=sinks, window=window))


def slot_of(position: int, sinks: int, window: int) -> int:
    return position if position < sinks else sinks + (position - sinks) % window


@dataclass(frozen=True)
class RaggedSteps:
    """Steps of a batch."""

    step: int
    """The option of kv-static: 1 for steps of a single token, else 0."""
    sizes: list[int]
    """The number of tokens of each step, padding included."""
    counts: list[list[int]]
    """The number of tokens without padding, by step and row."""


@st.composite
def ragged_steps(draw: st.DrawFn) -> RaggedSteps:
    step, batch = draw(st.sampled_from([0, 1])), draw(st.integers(1, 3))
    sizes = draw(st.lists(st.just(1) if step else st.integers(1, 9), min_size=1, max_size=14))
    return RaggedSteps(step, sizes, [draw(st.lists(st.integers(0, size), min_size=batch, max_size=batch)) for size in sizes])


@settings(max_examples=examples(13), deadline=None)
@given(
    steps=ragged_steps(),
    retention=st.sampled_from([(0, 1), (0, 4), (2, 1), (2, 3), (4, 5)]),
    seed=st.integers(0, 2**32 - 1),
)
@example(steps=RaggedSteps(1, [1], [[0]]), retention=(0, 1), seed=0)
@example(steps=RaggedSteps(1, [1] * 7, [[1, 1], [0, 1], [1, 1], [1, 0], [1, 1], [0, 1], [1, 0]]), retention=(0, 4), seed=0)
@example(steps=RaggedSteps(0, [3, 5, 2], [[0, 2], [5, 0], [0, 1]]), retention=(0, 4), seed=0)
def test_every_slot_equals_the_reference(steps: RaggedSteps, retention: tuple[int, int], seed: int) -> None:
    (sinks, window), batch = retention, len(steps.counts[0])
    model, interface, spec, _ = instrumented_gptj(steps.step, sinks, window)
    runner, random = StepRunner(model, batch, interface), np.random.default_rng(seed)
    tokens: dict[tuple[int, int, int], list[tuple[Array, Array]]] = {}
    seen_tokens = np.zeros(batch, int)
    for step_size, row_counts in zip(steps.sizes, steps.counts, strict=True):
        counts = np.array(row_counts)
        before = {name: value.copy() for name, value in runner.states.items()}
        mask = (np.arange(step_size) < counts[:, None]).astype(np.int64)
        outputs = runner.step(random.integers(0, VOCABULARY, (batch, step_size)), mask)
        seen_tokens += counts
        states = {state.name: outputs[state.output] for state in interface.states}
        assert states["length"].tolist() == seen_tokens.tolist()
        for index, layer in enumerate(spec.layers):
            for row in range(batch):
                for head in range(layer.kv_heads):
                    history = tokens.setdefault((index, row, head), [])
                    new = (outputs[tensor.update][row, head] for tensor in (layer.key, layer.value))
                    history += list(zip(*new, strict=True))[: counts[row]]
                    count, shift = len(history), max(0, len(history) - sinks - window)
                    keys, values = (states[tensor.state or ""][row, head] for tensor in (layer.key, layer.value))
                    is_free = np.ones(sinks + window, bool)
                    for position in range(count):
                        if position >= sinks and position < count - window:
                            continue
                        slot, (key, value) = slot_of(position, sinks, window), history[position]
                        is_free[slot] = False
                        assert np.array_equal(values[slot], value)
                        if position >= sinks:
                            assert np.array_equal(keys[slot], key)
                            continue
                        assert np.array_equal(states[f"sinks.{index}"][row, head, position], key)
                        rotated_keys = rotated("gptj", key[None], np.array([shift]))[0]
                        np.testing.assert_allclose(keys[slot], rotated_keys, rtol=0, atol=2e-5)
                    assert not keys[is_free].any()
                    assert not values[is_free].any()
        for row in np.flatnonzero(counts == 0):
            for state in interface.states:
                assert np.array_equal(runner.states[state.input][row], before[state.input][row]), state.name


@pytest.mark.parametrize("step", [0, 1])
def test_bound_states_equal_states_passed_by_value(step: int, tmp_path: Path) -> None:
    model = rewritten("llama", KvStatic(capacity=CAPACITY, step=step), KvWindow(sinks=2, window=7), Attention())
    states = interface_of(model).states
    caches = {state.name for state in states if state.name.startswith("past_key_values")}
    assert {state.name for state in states if state.in_place} == (caches if step else set())
    check_state_binding(model, random_ids(40), step or 5, tmp_path)


def test_prompt_graph_and_step_graph_share_states() -> None:
    ids, window = random_ids(50), KvWindow(sinks=3, window=8)
    prompts, steps = (StepRunner(rewritten("llama", KvStatic(capacity=CAPACITY, step=step), window), 2) for step in (0, 1))
    logits = [prompts.step(ids[:, :20])["logits"]]
    steps.states = prompts.states
    logits += [steps.step(ids[:, start : start + 1])["logits"] for start in range(20, 35)]
    prompts.states = steps.states
    logits.append(prompts.step(ids[:, 35:])["logits"])
    np.testing.assert_allclose(np.concatenate(logits, axis=1), reference_logits("llama", ids, 3, 8), rtol=0, atol=1e-4)


def test_rotation_errors_do_not_accumulate() -> None:
    """After 1000 tokens the error of the sink keys is at most that of one rotation with a float32 angle."""
    model, interface, spec, _ = instrumented_gptj(1, 2, 3)
    runner = StepRunner(model, 1, interface)
    for token in np.random.default_rng(8).integers(0, VOCABULARY, 1000):
        outputs = runner.step(np.array([[token]]))
    for index, layer in enumerate(spec.layers):
        unrotated = outputs[interface.states[-len(spec.layers) + index].output]
        rotated_keys = rotated("gptj", unrotated, np.full(2, 1000 - 5))
        np.testing.assert_allclose(
            outputs[layer.key.cache][:, :, :2], rotated_keys, rtol=0, atol=995 * 2**-22 * np.abs(unrotated).max()
        )


@pytest.mark.parametrize(("architecture", "capacity"), [("llama", None), ("gptj", 1024)])
def test_capacity_is_the_length_of_the_rope_table(architecture: str, capacity: int | None) -> None:
    model = rewritten(architecture, KvStatic(capacity=CAPACITY), KvWindow(window=8))
    assert interface_of(model).capacity == capacity


def test_properties_and_specification_follow() -> None:
    model = rewritten("llama", KvStatic(capacity=CAPACITY), KvWindow(sinks=3, window=8))
    assert KV_STATIC.check(model) is None
    assert "`window`" in (KV_DENSE.check(model) or "")
    spec = read_kv_cache_spec(model)
    assert spec is not None
    assert [(layer.policy.slots, layer.policy.method) for layer in spec.layers] == [(11, "window")] * 2
    assert [(layer.policy.sinks, layer.policy.window) for layer in spec.layers] == [(3, 8)] * 2
    static = KvStatic.inspect(rewritten("llama", KvStatic(capacity=CAPACITY)))
    assert KvWindow.torch_cache_factory(static, single_token=True) is None
    with pytest.raises(ModelError, match="depend on the query position, which requires hooks on the module"):
        KvWindow.torch_cache_factory(spec, single_token=True)


@pytest.mark.parametrize(
    ("architecture", "options", "message", "hint"),
    [
        ("llama", {"window": 0}, "`window` must be at least 1 (got 0)", "kv-window{window="),
        ("llama", {"sinks": -1, "window": 4}, "`sinks` must be at least 0 (got -1)", "kv-window{window="),
        ("llama", {"sinks": 4, "window": 61}, "`sinks` 4 + `window` 61 exceed the capacity of 64", "lower `window` to 60"),
        ("gpt2", {"window": 16}, "by a rotation", "kv-evict{score=position,budget=20,sinks=4}"),
    ],
)
def test_invalid_options_are_refused_and_leave_the_model_unchanged(
    architecture: str, options: dict[str, int], message: str, hint: str
) -> None:
    model = rewritten(architecture, KvStatic(capacity=CAPACITY))
    before = ir.to_proto(model).SerializeToString()
    outcome = KvWindow(**options).rewrite(model, CONTEXT)
    assert isinstance(outcome, Refusal)
    assert message in outcome.reason
    assert hint in (outcome.hint or "")
    assert ir.to_proto(model).SerializeToString() == before
    assert message in KvWindow(**options).estimate(model, CONTEXT).reason


def test_growing_caches_are_refused() -> None:
    outcome = KvWindow(window=8).rewrite(load(export("llama", STYLE)), CONTEXT)
    assert isinstance(outcome, Refusal)
    assert "kv-static" in (outcome.hint or "")


def test_estimate_equals_the_change_in_state_bytes() -> None:
    model = rewritten("llama", KvStatic(capacity=CAPACITY))
    before, estimate = state_bytes(model), KvWindow(window=16).estimate(model, CONTEXT)
    KvWindow(window=16).rewrite(model, CONTEXT)
    assert estimate.state_bytes == state_bytes(model) - before
