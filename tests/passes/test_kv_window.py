"""kv-window: what StreamingLLM attends to, token by token and however it is cut into steps, slot by slot."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.decoders import ARCHITECTURES, VOCABULARY, export, module, torch_steps
from support.step_runner import StepRunner, check_state_binding
from transformers.cache_utils import Cache, CacheLayerMixin

from ryzen_compile.errors import ModelError
from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.ir.load import load
from ryzen_compile.spec.interface import Interface
from ryzen_compile.spec.kv_cache import KVCacheSpec, read_kv_cache_spec
from ryzen_compile.spec.passes import Change, Pass, PassContext, Refusal
from ryzen_passes.attention import Attention
from ryzen_passes.kv.static import KvStatic
from ryzen_passes.kv.window import KvWindow
from ryzen_passes.properties import KV_DENSE, KV_STATIC

Array = np.ndarray[Any, Any]
STYLE = "optimum-sdpa"
CAPACITY = 64
CONTEXT = PassContext(backend="onnxruntime")
TURNED = ("llama", "mistral", "gptj", "gpt-neox")


def rewritten(architecture: str, *passes: Pass, style: str = STYLE) -> ir.Model:
    model = load(export(architecture, style))
    for pass_ in passes:
        outcome = pass_.rewrite(model, CONTEXT)
        assert isinstance(outcome, Change), outcome
    return model


def turned(architecture: str, keys: Array, positions: Array) -> Array:
    """Return `keys` (..., rows, size) turned by `positions` (rows,), as the configuration has it; float64."""
    options = ARCHITECTURES[architecture][1]
    rope = options.get("rope_parameters", {})
    size = options.get("rotary_dim", int(keys.shape[-1] * rope.get("partial_rotary_factor", 1)))
    angle = np.asarray(positions)[:, None] * 10000.0 ** -(np.arange(0, size, 2) / size)
    apart = architecture == "gptj"
    one, two = (np.arange(0, size, 2), np.arange(1, size, 2)) if apart else (np.arange(size // 2), np.arange(size // 2, size))
    moved = np.asarray(keys, np.float64).copy()
    moved[..., one] = keys[..., one] * np.cos(angle) - keys[..., two] * np.sin(angle)
    moved[..., two] = keys[..., two] * np.cos(angle) + keys[..., one] * np.sin(angle)
    return moved


class Streaming(CacheLayerMixin):  # type: ignore[misc]
    """Keys as they were before they were turned; a token stands where it lies in the cache, and moves when one falls out."""

    def __init__(self, architecture: str, sinks: int, window: int) -> None:
        super().__init__()
        self.architecture, self.sinks, self.slots, self.seen = architecture, sinks, sinks + window, 0
        self.is_initialized = True
        self.plain: list[Array] = []
        self.rows: list[torch.Tensor] = []

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise NotImplementedError

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        assert key_states.shape[2] == 1
        self.plain.append(turned(self.architecture, key_states.numpy(), np.array([-self.get_seq_length()])))
        self.rows.append(value_states)
        self.seen += 1
        if len(self.rows) > self.slots:
            del self.plain[self.sinks], self.rows[self.sinks]
        keys = turned(self.architecture, np.concatenate(self.plain, axis=2), np.arange(len(self.plain)))
        return torch.from_numpy(keys.astype(np.float32)), torch.cat(self.rows, dim=2)

    def get_seq_length(self) -> int:
        return min(self.seen, self.slots - 1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


def streamed(architecture: str, ids: Array, sinks: int, window: int) -> Array:
    """Return the module's logits (batch, tokens, vocabulary), token by token over `Streaming` caches."""
    model, logits = module(architecture), []
    cache = Cache(layers=[Streaming(architecture, sinks, window) for _ in range(model.config.num_hidden_layers)])
    with torch.no_grad():
        for at in range(ids.shape[1]):
            place = torch.full((len(ids), 1), cache.get_seq_length())
            out = model(torch.from_numpy(ids[:, at : at + 1]), past_key_values=cache, use_cache=True, position_ids=place)
            logits.append(out.logits.numpy())
    return np.concatenate(logits, axis=1)


def stepped(model: ir.Model, ids: Array, chunks: list[int]) -> Array:
    stepper, logits, at = StepRunner(model, len(ids)), [], 0
    for chunk in chunks:
        logits.append(stepper.step(ids[:, at : at + chunk])["logits"])
        at += chunk
    return np.concatenate(logits, axis=1)


def drawn(tokens: int, batch: int = 2) -> Array:
    return np.random.default_rng(5).integers(0, VOCABULARY, (batch, tokens))


@pytest.mark.parametrize("architecture", TURNED)
@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize(("sinks", "window"), [(4, 8), (4, 22), (0, 5)])
def test_it_attends_as_a_cache_that_gives_tokens_new_places(architecture: str, step: int, sinks: int, window: int) -> None:
    ids = drawn(60)
    model = rewritten(architecture, KvStatic(capacity=CAPACITY, step=step), KvWindow(sinks=sinks, window=window), Attention())
    chunks = [1] * 60 if step else [3, 1, 11, *[1] * 5, 25, 15]
    expected = streamed(architecture, ids, sinks, window)
    np.testing.assert_allclose(stepped(model, ids, chunks), expected, rtol=0, atol=1e-4)
    kept = torch_steps(architecture, ids, [60])
    assert np.abs(expected - kept)[:, : sinks + window].max() < 1e-4 < np.abs(expected - kept)[:, -1].max()


@pytest.mark.parametrize("style", ["genai", "optimum-eager"])
def test_rotations_by_other_ops_are_turned_alike(style: str) -> None:
    ids = drawn(40)
    model = rewritten("llama", KvStatic(capacity=CAPACITY, step=1), KvWindow(sinks=2, window=9), Attention(), style=style)
    np.testing.assert_allclose(stepped(model, ids, [1] * 40), streamed("llama", ids, 2, 9), rtol=0, atol=1e-4)


@pytest.mark.parametrize("step", [0, 1])
def test_rows_of_different_lengths_are_each_as_alone(step: int) -> None:
    model, ids = rewritten("llama", KvStatic(capacity=CAPACITY, step=step), KvWindow(sinks=2, window=6)), drawn(40, 3)
    random, stepper, seen = np.random.default_rng(6), StepRunner(model, 3), np.zeros(3, int)
    got: list[list[Array]] = [[], [], []]
    for _ in range(40 if step else 9):
        width = step or int(random.integers(1, 10))
        counts = np.minimum(random.integers(0, width + 1, 3), 40 - seen)
        tokens = np.zeros((3, width), np.int64)
        for row in range(3):
            tokens[row, : counts[row]] = ids[row, seen[row] : seen[row] + counts[row]]
        logits = stepper.step(tokens, (np.arange(width) < counts[:, None]).astype(np.int64))["logits"]
        for row in range(3):
            got[row].append(logits[row, : counts[row]])
        seen += counts
    assert (seen > 12).all()
    for row in range(3):
        alone = streamed("llama", ids[row : row + 1, : seen[row]], 2, 6)[0]
        np.testing.assert_allclose(np.concatenate(got[row]), alone, rtol=0, atol=1e-4)


@functools.cache
def watched(step: int, sinks: int, window: int) -> tuple[ir.Model, Interface, KVCacheSpec]:
    """Return a gptj of rings with what each step adds among its outputs, its interface without those, and its map."""
    model = rewritten("gptj", KvStatic(capacity=CAPACITY, step=step), KvWindow(sinks=sinks, window=window))
    interface, told = interface_of(model), read_kv_cache_spec(model)
    assert told is not None
    values = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.extend(values[side.update] for layer in told.layers for side in (layer.key, layer.value))
    return model, interface, told


def slot_of(position: int, sinks: int, window: int) -> int:
    return position if position < sinks else sinks + (position - sinks) % window


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_slot_holds_what_the_slow_reference_holds(data: st.DataObject) -> None:
    step = data.draw(st.sampled_from([0, 1]))
    sinks, window = data.draw(st.sampled_from([(0, 1), (0, 4), (2, 1), (2, 3), (4, 5)]))
    batch = data.draw(st.integers(1, 3))
    model, interface, told = watched(step, sinks, window)
    stepper, random = StepRunner(model, batch, interface), np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    tokens: dict[tuple[int, int, int], list[tuple[Array, Array]]] = {}
    seen = np.zeros(batch, int)
    for _ in range(data.draw(st.integers(1, 14))):
        width = step or data.draw(st.integers(1, 9))
        counts = np.array([data.draw(st.integers(0, width)) for _ in range(batch)])
        before = {name: value.copy() for name, value in stepper.states.items()}
        mask = (np.arange(width) < counts[:, None]).astype(np.int64)
        outputs = stepper.step(random.integers(0, VOCABULARY, (batch, width)), mask)
        seen += counts
        states = {state.name: outputs[state.output] for state in interface.states}
        assert states["length"].tolist() == seen.tolist()
        for at, layer in enumerate(told.layers):
            for row in range(batch):
                for head in range(layer.kv_heads):
                    held = tokens.setdefault((at, row, head), [])
                    new = (outputs[side.update][row, head] for side in (layer.key, layer.value))
                    held += list(zip(*new, strict=True))[: counts[row]]
                    count, shift = len(held), max(0, len(held) - sinks - window)
                    keys, values = (states[side.state or ""][row, head] for side in (layer.key, layer.value))
                    empty = np.ones(sinks + window, bool)
                    for position in range(count):
                        if position >= sinks and position < count - window:
                            continue
                        slot, (key, value) = slot_of(position, sinks, window), held[position]
                        empty[slot] = False
                        assert np.array_equal(values[slot], value)
                        if position >= sinks:
                            assert np.array_equal(keys[slot], key)
                            continue
                        assert np.array_equal(states[f"sinks.{at}"][row, head, position], key)
                        moved = turned("gptj", key[None], np.array([shift]))[0]
                        np.testing.assert_allclose(keys[slot], moved, rtol=0, atol=2e-5)
                    assert not keys[empty].any()
                    assert not values[empty].any()
        for row in np.flatnonzero(counts == 0):
            for state in interface.states:
                assert np.array_equal(stepper.states[state.input][row], before[state.input][row]), state.name


@pytest.mark.parametrize("step", [0, 1])
def test_states_bound_to_memory_give_what_states_handed_on_give(step: int, tmp_path: Path) -> None:
    model = rewritten("llama", KvStatic(capacity=CAPACITY, step=step), KvWindow(sinks=2, window=7), Attention())
    states = interface_of(model).states
    caches = {state.name for state in states if state.name.startswith("past_key_values")}
    assert {state.name for state in states if state.in_place} == (caches if step else set())
    check_state_binding(model, drawn(40), step or 5, tmp_path)


def test_a_graph_for_prompts_and_one_for_steps_take_the_same_states() -> None:
    ids, window = drawn(50), KvWindow(sinks=3, window=8)
    prompts, steps = (StepRunner(rewritten("llama", KvStatic(capacity=CAPACITY, step=step), window), 2) for step in (0, 1))
    logits = [prompts.step(ids[:, :20])["logits"]]
    steps.states = prompts.states
    logits += [steps.step(ids[:, at : at + 1])["logits"] for at in range(20, 35)]
    prompts.states = steps.states
    logits.append(prompts.step(ids[:, 35:])["logits"])
    np.testing.assert_allclose(np.concatenate(logits, axis=1), streamed("llama", ids, 3, 8), rtol=0, atol=1e-4)


def test_turning_does_not_add_up() -> None:
    """After 1000 tokens the keys of sinks are as far off as an angle in float32 is, and no further."""
    model, interface, told = watched(1, 2, 3)
    stepper = StepRunner(model, 1, interface)
    for token in np.random.default_rng(8).integers(0, VOCABULARY, 1000):
        outputs = stepper.step(np.array([[token]]))
    for at, layer in enumerate(told.layers):
        made = outputs[interface.states[-len(told.layers) + at].output]
        moved = turned("gptj", made, np.full(2, 1000 - 5))
        np.testing.assert_allclose(outputs[layer.key.cache][:, :, :2], moved, rtol=0, atol=995 * 2**-22 * np.abs(made).max())


@pytest.mark.parametrize(("architecture", "capacity"), [("llama", None), ("gptj", 1024)])
def test_sequences_end_where_a_table_of_angles_does(architecture: str, capacity: int | None) -> None:
    model = rewritten(architecture, KvStatic(capacity=CAPACITY), KvWindow(window=8))
    assert interface_of(model).capacity == capacity


def test_facts_and_the_map_follow() -> None:
    model = rewritten("llama", KvStatic(capacity=CAPACITY), KvWindow(sinks=3, window=8))
    assert KV_STATIC.check(model) is None
    assert "`window`" in (KV_DENSE.check(model) or "")
    told = read_kv_cache_spec(model)
    assert told is not None
    assert {(layer.slots, layer.method, layer.sinks, layer.recent_window) for layer in told.layers} == {(11, "window", 3, 8)}
    assert (
        KvWindow.torch_reference(KvStatic.inspect(rewritten("llama", KvStatic(capacity=CAPACITY))), single_token=True) is None
    )
    with pytest.raises(ModelError, match="of which a cache alone is not told"):
        KvWindow.torch_reference(told, single_token=True)


@pytest.mark.parametrize(
    ("architecture", "options", "says", "hint"),
    [
        ("llama", {}, "window of 0", "kv-window{window="),
        ("llama", {"sinks": -1, "window": 4}, "-1 sinks", "kv-window{window="),
        ("llama", {"sinks": 4, "window": 61}, "more than the capacity of 64", "lower it to 60"),
        ("gpt2", {"window": 16}, "by a rotation", "kv-evict{score=position,budget=20,sinks=4}"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_changed(
    architecture: str, options: dict[str, int], says: str, hint: str
) -> None:
    model = rewritten(architecture, KvStatic(capacity=CAPACITY))
    before = ir.to_proto(model).SerializeToString()
    outcome = KvWindow(**options).rewrite(model, CONTEXT)
    assert isinstance(outcome, Refusal)
    assert says in outcome.reason
    assert hint in (outcome.hint or "")
    assert ir.to_proto(model).SerializeToString() == before
    assert says in KvWindow(**options).estimate(model, CONTEXT).reason


def test_growing_caches_are_refused() -> None:
    outcome = KvWindow(window=8).rewrite(load(export("llama", STYLE)), CONTEXT)
    assert isinstance(outcome, Refusal)
    assert "kv-static" in (outcome.hint or "")


def test_the_estimate_is_what_the_states_come_to() -> None:
    model = rewritten("llama", KvStatic(capacity=CAPACITY))
    before, estimate = state_bytes(model), KvWindow(window=16).estimate(model, CONTEXT)
    KvWindow(window=16).rewrite(model, CONTEXT)
    assert estimate.state_bytes == state_bytes(model) - before


def state_bytes(model: ir.Model) -> int:
    interface = interface_of(model)
    specs = [interface.input(state.input) for state in interface.states]
    return sum(
        int(np.prod([1 if isinstance(dim, str) else dim for dim in spec.dims or ()])) * np.dtype(spec.dtype).itemsize
        for spec in specs
    )
