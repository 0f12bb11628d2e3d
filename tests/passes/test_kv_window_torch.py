"""PyTorch reference of kv-window: a module with streaming caches agrees with the rewritten graph."""

from __future__ import annotations

import copy
import functools
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.decoder_matrix import architectures
from support.decoders import VOCABULARY, cached_steps, torch_steps
from support.decoders import module as shared_module
from support.rewritten_decoders import cache_spec, reference_steps, rewritten
from support.step_runner import StepRunner
from transformers.cache_utils import Cache, DynamicCache

from ryzen_compile.errors import ModelError
from ryzen_compile.spec.kv_cache import CacheTensorSpec, KVCacheSpec, LayerCacheSpec, Quantization, RingBuffer
from ryzen_compile.spec.passes import Pass
from ryzen_passes.attention import Attention
from ryzen_passes.kv.evict import KvEvict
from ryzen_passes.kv.static import KvStatic
from ryzen_passes.kv.window import KvWindow
from ryzen_passes.kv.window.torch_reference import StreamingLayer

Array = np.ndarray[Any, Any]
TOKENS = 90
CHUNKS = [7, 1, 30, 1, 1, 9, *[1] * 11, 25, 5]
CHUNKINGS = pytest.mark.parametrize(
    ("step", "chunks"),
    [(1, [1] * TOKENS), (0, [1] * TOKENS), (0, CHUNKS), (0, [TOKENS])],
    ids=["single-token-graph", "single-tokens", "chunks", "one-step"],
)


@functools.cache
def module(architecture: str, attention: str = "sdpa") -> torch.nn.Module:
    """Return a copy of the module, because hooks remain on it."""
    return copy.deepcopy(shared_module(architecture, attention))


def random_ids(tokens: int = TOKENS) -> Array:
    return np.random.default_rng(7).integers(0, VOCABULARY, (2, tokens))


def rewritten_graph(architecture: str, *passes: Pass) -> tuple[StepRunner, KVCacheSpec]:
    """Return a runner of the rewritten decoder for two rows, and its cache specification."""
    model = rewritten(architecture, *passes)
    return StepRunner(model, 2), cache_spec(model)


@pytest.mark.parametrize(("architecture", "sinks", "window"), [("llama", 4, 16), ("mistral", 4, 22), ("gptj", 3, 10)])
@CHUNKINGS
def test_the_reference_agrees_with_the_rewritten_graph(
    architecture: str, sinks: int, window: int, step: int, chunks: list[int]
) -> None:
    """Mistral has 26 slots and a window of 24 tokens: two of the sinks are outside of its window."""
    stepper, spec = rewritten_graph(
        architecture, KvStatic(capacity=96, step=step), KvWindow(sinks=sinks, window=window), Attention()
    )
    ids, slots = random_ids(), sinks + window
    logits = reference_steps(module(architecture), KvWindow, spec, ids, chunks, single_token=step == 1)
    np.testing.assert_allclose(stepper.logits(ids, chunks), logits, rtol=0, atol=2e-4)
    full = torch_steps(architecture, ids, chunks)
    np.testing.assert_allclose(logits[:, :slots], full[:, :slots], rtol=0, atol=1e-4)
    assert np.abs(logits - full)[:, 2 * slots :].max(axis=2).min() > 1e-2
    np.testing.assert_array_equal(
        reference_steps(module(architecture), KvWindow, spec, ids, chunks, single_token=step != 1), logits
    )


@pytest.mark.parametrize("architecture", architectures("phi3", "qwen2", "qwen3", "gpt-neox", "gemma", "falcon"))
def test_other_architectures_agree(architecture: str) -> None:
    stepper, spec = rewritten_graph(architecture, KvStatic(capacity=96), KvWindow(sinks=4, window=12))
    ids, chunks = random_ids(), [30, 1, 1, 20, *[1] * 8, 30]
    logits = reference_steps(module(architecture), KvWindow, spec, ids, chunks)
    np.testing.assert_allclose(stepper.logits(ids, chunks), logits, rtol=0, atol=2e-4)
    assert np.abs(logits - torch_steps(architecture, ids, chunks))[:, 32:].max(axis=2).min() > 1e-2


@pytest.mark.parametrize(("sinks", "window"), [(0, 1), (0, 9), (1, 1), (8, 3), (3, 40)])
@pytest.mark.parametrize("step", [0, 1])
def test_any_number_of_sinks_agrees(sinks: int, window: int, step: int) -> None:
    stepper, spec = rewritten_graph("llama", KvStatic(capacity=96, step=step), KvWindow(sinks=sinks, window=window))
    ids, chunks = random_ids(), [1] * TOKENS if step else [2, 1, 5, *CHUNKS[1:-1], 3]
    logits = reference_steps(module("llama"), KvWindow, spec, ids, chunks, single_token=step == 1)
    np.testing.assert_allclose(stepper.logits(ids, chunks), logits, rtol=0, atol=2e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_both_attention_implementations_use_the_mask(attention: str) -> None:
    stepper, spec = rewritten_graph("mistral", KvStatic(capacity=96), KvWindow(sinks=4, window=22))
    logits = reference_steps(module("mistral", attention), KvWindow, spec, random_ids(), CHUNKS)
    np.testing.assert_allclose(stepper.logits(random_ids(), CHUNKS), logits, rtol=0, atol=2e-4)


@pytest.mark.parametrize("architecture", ["llama", "gptj"])
def test_the_reference_agrees_over_sixty_windows(architecture: str) -> None:
    stepper, spec = rewritten_graph(architecture, KvStatic(capacity=64), KvWindow(sinks=4, window=12))
    ids, chunks = random_ids(1000), [*[64] * 15, *[1] * 40]
    logits = reference_steps(module(architecture), KvWindow, spec, ids, chunks)
    np.testing.assert_allclose(stepper.logits(ids, chunks), logits, rtol=0, atol=2e-4)


def layer_spec(sinks: int, window: int, attention_window: int | None = None) -> tuple[LayerCacheSpec, RingBuffer]:
    side = CacheTensorSpec(state="", update="", cache="", head_size=2, dtype="float32")
    policy = RingBuffer(sinks=sinks, window=window, sink_state="" if sinks else None, write=None, attended="other")
    shape = {"heads": 3, "kv_heads": 1, "window": attention_window}
    return LayerCacheSpec(attention_node="", key=side, value=side, policy=policy, **shape), policy


@given(data=st.data())
def test_each_query_attends_to_each_token_once_at_its_position(data: st.DataObject) -> None:
    """Keys are (token, position), so that the visible tokens can be read from them."""
    sinks, window = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 6))
    attention_window = data.draw(st.none() | st.integers(1, 12))
    layer, seen = StreamingLayer(*layer_spec(sinks, window, attention_window)), 0
    for seq in data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=8)):
        token = torch.arange(seen, seen + seq, dtype=torch.float32).view(1, seq, 1).expand(2, seq, 1)
        positions = token[:1, :, 0]
        mask = layer.prepare_step(token, {"position_ids": positions}, make_keys)
        keys, values = layer.update(make_keys(token, {"position_ids": positions.expand(2, seq)}), token[:, None])
        assert mask.shape == (2, 1, seq, keys.shape[2])
        assert layer.keys.shape[2] <= window
        for row, query in np.ndindex(2, seq):
            position, visible = seen + query, mask[row, 0, query] == 0
            shift = max(0, position + 1 - sinks - window)
            expected = {(p, p + shift) for p in range(min(sinks, position + 1))}
            expected |= {(p, p) for p in range(max(sinks, position + 1 - window), position + 1)}
            expected = {
                (p, shifted) for p, shifted in expected if attention_window is None or position - shifted < attention_window
            }
            assert sorted(map(tuple, keys[row, 0, visible].tolist())) == sorted(expected)
            assert values[row, 0, visible, 0].tolist() == keys[row, 0, visible, 0].tolist()
        seen += seq
        assert layer.get_seq_length() == seen


def make_keys(hidden: torch.Tensor, position_arguments: dict[str, Any]) -> torch.Tensor:
    return torch.cat([hidden, position_arguments["position_ids"][..., None]], dim=2)[:, None]


def test_a_reset_cache_is_empty() -> None:
    _, spec = rewritten_graph("llama", KvStatic(capacity=96), KvWindow(sinks=2, window=9))
    make = KvWindow.torch_cache_factory(spec, single_token=False, module=module("llama"))
    assert make is not None
    cache = make()
    first = cached_steps(module("llama"), cache, random_ids(), CHUNKS)
    cache.reset()
    np.testing.assert_array_equal(cached_steps(module("llama"), cache, random_ids(), CHUNKS), first)


def test_hooks_do_not_affect_other_caches() -> None:
    _, spec = rewritten_graph("llama", KvStatic(capacity=96), KvWindow(sinks=2, window=9))
    _, evict_spec = rewritten_graph(
        "llama", KvStatic(capacity=96), KvEvict(score="knorm", budget="20", sinks=2, recent_window=5, pyramid=2.5)
    )
    model, ids = copy.deepcopy(shared_module("llama")), random_ids()
    others = KvEvict.torch_cache_factory(evict_spec, single_token=False, module=model)
    assert others is not None
    full, evicted = (cached_steps(model, make(), ids, CHUNKS) for make in (DynamicCache, others))
    before = hook_count(model)
    for _ in range(2):
        KvWindow.torch_cache_factory(spec, single_token=False, module=model)
    assert hook_count(model) == before + 2
    np.testing.assert_array_equal(cached_steps(model, DynamicCache(), ids, CHUNKS), full)
    np.testing.assert_array_equal(cached_steps(model, others(), ids, CHUNKS), evicted)


def hook_count(model: torch.nn.Module) -> int:
    return sum(len(part._forward_pre_hooks) for part in model.modules())


EIGHT_BITS = Quantization(storage_type="8", scale_state="")


def test_other_methods_and_quantized_caches_return_none() -> None:
    _, static = rewritten_graph("llama", KvStatic(capacity=96))
    _, spec = rewritten_graph("llama", KvStatic(capacity=96), KvWindow(sinks=2, window=9))
    first, *rest = spec.layers
    quantized_layer = msgspec.structs.replace(first, key=msgspec.structs.replace(first.key, quantization=EIGHT_BITS))
    assert KvWindow.torch_cache_factory(static, single_token=False, module=module("llama")) is None
    quantized = msgspec.structs.replace(spec, layers=(quantized_layer, *rest))
    assert KvWindow.torch_cache_factory(quantized, single_token=False, module=module("llama")) is None


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (None, "the keys of sinks depend on the query position, which requires hooks on the module"),
        ("linear", "the graph has 2 attention layers, and 0 attention modules were found in the module"),
        ("gpt2", "GPT2Attention takes no position argument, so the keys of sinks cannot be recomputed"),
        ("bloom", "BloomAttention takes no position argument, so the keys of sinks cannot be recomputed"),
    ],
)
def test_unsupported_modules_are_refused(architecture: str | None, message: str) -> None:
    _, spec = rewritten_graph("llama", KvStatic(capacity=96), KvWindow(sinks=2, window=9))
    model = torch.nn.Linear(2, 2) if architecture == "linear" else module(architecture) if architecture is not None else None
    before = hook_count(model) if model is not None else 0
    with pytest.raises(ModelError, match=message) as caught:
        KvWindow.torch_cache_factory(spec, single_token=False, module=model)
    assert caught.value.hint is not None
    assert model is None or hook_count(model) == before


@pytest.mark.parametrize("sinks", [0, 2])
def test_update_without_prepare_step_is_refused(sinks: int) -> None:
    layer = StreamingLayer(*layer_spec(sinks, 4))
    token, positions = torch.zeros(1, 1, 1), {"position_ids": torch.zeros(1, 1)}
    keys = make_keys(token, positions)
    with pytest.raises(ModelError, match="the input of attention is unknown to the cache layer"):
        layer.update(keys, keys)
    layer.prepare_step(token, positions, make_keys)
    layer.update(keys, keys)
    with pytest.raises(ModelError, match="the input of attention is unknown to the cache layer"):
        layer.update(keys, keys)
    layer.prepare_step(token, positions, make_keys)
    layer.reset()
    with pytest.raises(ModelError, match="the input of attention is unknown to the cache layer"):
        layer.update(keys, keys)


class FakeAttention(torch.nn.Module):  # type: ignore[misc]
    """An attention module whose keys are (hidden state, position); `positions_from` selects the source of the positions."""

    layer_idx = 0

    def __init__(self, positions_from: str) -> None:
        super().__init__()
        self.positions_from = positions_from

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor | None:
        assert past_key_values is not None
        assert position_ids is not None
        if self.positions_from == "nothing":
            return None
        if self.positions_from == "cache":
            start = past_key_values.get_seq_length()
            position_ids = torch.arange(start, start + hidden_states.shape[1])[None]
        keys = make_keys(hidden_states, {"position_ids": position_ids.float()})
        past_key_values.update(keys, keys, self.layer_idx)
        return attention_mask


@pytest.mark.parametrize(
    ("positions_from", "positions", "message"),
    [
        ("cache", torch.arange(5)[None], "attention computes a different key for the same token at the same position"),
        ("nothing", torch.arange(5)[None], "FakeAttention appends no keys to its cache"),
        ("arguments", torch.zeros(3, 1, 5), r"`position_ids` of attention has the shape \(3, 1, 5\), expected \(1, 5, ...\)"),
        ("arguments", torch.zeros(2, 5), r"`position_ids` of attention has the shape \(2, 5\), expected \(1, 5, ...\)"),
        ("arguments", torch.zeros(1, 6), r"`position_ids` of attention has the shape \(1, 6\), expected \(1, 5, ...\)"),
        ("arguments", torch.zeros(1), r"`position_ids` of attention has the shape \(1,\), expected \(1, 5, ...\)"),
    ],
)
def test_attention_with_different_keys_is_refused(positions_from: str, positions: torch.Tensor, message: str) -> None:
    layer, policy = layer_spec(2, 4)
    spec = KVCacheSpec(layers=(layer,), position_encoding="rope", max_positions=None, padding=False)
    faulty, correct = FakeAttention(positions_from), FakeAttention("arguments")
    for attention in (faulty, correct):
        assert KvWindow.torch_cache_factory(spec, single_token=False, module=attention) is not None
    mask = correct(
        torch.zeros(1, 5, 1), None, torch.arange(5)[None], past_key_values=Cache(layers=[StreamingLayer(layer, policy)])
    )
    assert mask.shape == (1, 1, 5, 13)
    with pytest.raises(ModelError, match=message):
        faulty(torch.zeros(1, 5, 1), position_ids=positions, past_key_values=Cache(layers=[StreamingLayer(layer, policy)]))
