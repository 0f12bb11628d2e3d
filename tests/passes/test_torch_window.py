"""kv-window in torch: a module whose sinks follow the window attends to what the rewritten graph attends to."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.decoders import VOCABULARY, architecture_params, cached_steps, export, torch_steps
from support.decoders import module as shared
from support.step_runner import StepRunner
from transformers.cache_utils import Cache, DynamicCache

from ryzen_compile.errors import ModelError
from ryzen_compile.ir.load import load
from ryzen_compile.spec.kv_cache import CacheTensorSpec, KVCacheSpec, LayerCacheSpec, read_kv_cache_spec
from ryzen_compile.spec.passes import Change, Pass, PassContext
from ryzen_passes.attention import Attention
from ryzen_passes.kv.evict import KvEvict
from ryzen_passes.kv.static import KvStatic
from ryzen_passes.kv.window import KvWindow
from ryzen_passes.kv.window.torch_reference import StreamingLayer

Array = np.ndarray[Any, Any]
TOKENS = 90
CHUNKS = [7, 1, 30, 1, 1, 9, *[1] * 11, 25, 5]
FORMS = pytest.mark.parametrize(
    ("step", "chunks"),
    [(1, [1] * TOKENS), (0, [1] * TOKENS), (0, CHUNKS), (0, [TOKENS])],
    ids=["steps-of-one", "ones", "chunks", "at-once"],
)


@functools.cache
def module(architecture: str, attention: str = "sdpa") -> torch.nn.Module:
    """Return a copy of the module, as hooks stay on it."""
    return copy.deepcopy(shared(architecture, attention))


def drawn(tokens: int = TOKENS) -> Array:
    return np.random.default_rng(7).integers(0, VOCABULARY, (2, tokens))


def graph(architecture: str, *passes: Pass) -> tuple[StepRunner, KVCacheSpec]:
    """Return the rewritten decoder on ONNX Runtime, two rows of it, and the map of its caches."""
    model = load(export(architecture, "optimum-sdpa"))
    for pass_ in passes:
        outcome = pass_.rewrite(model, PassContext(backend="onnxruntime"))
        assert isinstance(outcome, Change), outcome
    told = read_kv_cache_spec(model)
    assert told is not None
    return StepRunner(model, 2), told


def onnx_steps(stepper: StepRunner, ids: Array, chunks: Sequence[int]) -> Array:
    """Return the logits (batch, tokens, vocabulary) of `ids`, fed in `chunks`."""
    ends = np.cumsum(chunks)
    return np.concatenate([stepper.step(ids[:, end - one : end])["logits"] for end, one in zip(ends, chunks, strict=True)], 1)


def streamed(
    architecture: str, told: KVCacheSpec, ids: Array, chunks: Sequence[int], *, singles: bool = False, attention: str = "sdpa"
) -> Array:
    model = module(architecture, attention)
    make = KvWindow.torch_reference(told, single_token=singles, module=model)
    assert make is not None
    return cached_steps(model, make(), ids, chunks)


@pytest.mark.parametrize(("architecture", "sinks", "window"), [("llama", 4, 16), ("mistral", 4, 22), ("gptj", 3, 10)])
@FORMS
def test_torch_agrees_with_the_rewritten_graph(
    architecture: str, sinks: int, window: int, step: int, chunks: list[int]
) -> None:
    """The 26 slots of mistral are more than a query of it sees: two of the sinks are behind its window."""
    stepper, told = graph(architecture, KvStatic(capacity=96, step=step), KvWindow(sinks=sinks, window=window), Attention())
    ids, slots = drawn(), sinks + window
    found = streamed(architecture, told, ids, chunks, singles=step == 1)
    np.testing.assert_allclose(onnx_steps(stepper, ids, chunks), found, rtol=0, atol=2e-4)
    full = torch_steps(architecture, ids, chunks)
    np.testing.assert_allclose(found[:, :slots], full[:, :slots], rtol=0, atol=1e-4)
    assert np.abs(found - full)[:, 2 * slots :].max(axis=2).min() > 1e-2
    np.testing.assert_array_equal(streamed(architecture, told, ids, chunks, singles=step != 1), found)


@pytest.mark.parametrize("architecture", architecture_params("phi3", "qwen2", "qwen3", "gpt-neox", "gemma", "falcon"))
def test_other_architectures_agree(architecture: str) -> None:
    stepper, told = graph(architecture, KvStatic(capacity=96), KvWindow(sinks=4, window=12))
    ids, chunks = drawn(), [30, 1, 1, 20, *[1] * 8, 30]
    found = streamed(architecture, told, ids, chunks)
    np.testing.assert_allclose(onnx_steps(stepper, ids, chunks), found, rtol=0, atol=2e-4)
    assert np.abs(found - torch_steps(architecture, ids, chunks))[:, 32:].max(axis=2).min() > 1e-2


@pytest.mark.parametrize(("sinks", "window"), [(0, 1), (0, 9), (1, 1), (8, 3), (3, 40)])
@pytest.mark.parametrize("step", [0, 1])
def test_any_number_of_sinks_agrees(sinks: int, window: int, step: int) -> None:
    stepper, told = graph("llama", KvStatic(capacity=96, step=step), KvWindow(sinks=sinks, window=window))
    ids, chunks = drawn(), [1] * TOKENS if step else [2, 1, 5, *CHUNKS[1:-1], 3]
    found = streamed("llama", told, ids, chunks, singles=step == 1)
    np.testing.assert_allclose(onnx_steps(stepper, ids, chunks), found, rtol=0, atol=2e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_either_attention_takes_the_mask(attention: str) -> None:
    stepper, told = graph("mistral", KvStatic(capacity=96), KvWindow(sinks=4, window=22))
    found = streamed("mistral", told, drawn(), CHUNKS, attention=attention)
    np.testing.assert_allclose(onnx_steps(stepper, drawn(), CHUNKS), found, rtol=0, atol=2e-4)


@pytest.mark.parametrize("architecture", ["llama", "gptj"])
def test_they_agree_sixty_windows_on(architecture: str) -> None:
    stepper, told = graph(architecture, KvStatic(capacity=64), KvWindow(sinks=4, window=12))
    ids, chunks = drawn(1000), [*[64] * 15, *[1] * 40]
    found = streamed(architecture, told, ids, chunks)
    np.testing.assert_allclose(onnx_steps(stepper, ids, chunks), found, rtol=0, atol=2e-4)


def told_layer(**options: Any) -> LayerCacheSpec:
    side = CacheTensorSpec(state="", update="", cache="", head_size=2, dtype="float32")
    return LayerCacheSpec(attention_node="", heads=3, kv_heads=1, key=side, value=side, method="window", **options)


@given(data=st.data())
def test_each_query_sees_each_token_once_and_in_its_place(data: st.DataObject) -> None:
    """A key here is (token, place), so that what is seen can be read off it."""
    sinks, window = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 6))
    sight = data.draw(st.none() | st.integers(1, 12))
    layer, seen = StreamingLayer(told_layer(sinks=sinks, recent=window, slots=sinks + window, window=sight)), 0
    for seq in data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=8)):
        token = torch.arange(seen, seen + seq, dtype=torch.float32).view(1, seq, 1).expand(2, seq, 1)
        place = token[:1, :, 0]
        mask = layer.prepare_step(token, {"position_ids": place}, pairs)
        keys, values = layer.update(pairs(token, {"position_ids": place.expand(2, seq)}), token[:, None])
        assert mask.shape == (2, 1, seq, keys.shape[2])
        assert layer.keys.shape[2] <= window
        for row, query in np.ndindex(2, seq):
            at, sees = seen + query, mask[row, 0, query] == 0
            shift = max(0, at + 1 - sinks - window)
            expected = {(p, p + shift) for p in range(min(sinks, at + 1))}
            expected |= {(p, p) for p in range(max(sinks, at + 1 - window), at + 1)}
            expected = {(p, stands) for p, stands in expected if sight is None or at - stands < sight}
            assert sorted(map(tuple, keys[row, 0, sees].tolist())) == sorted(expected)
            assert values[row, 0, sees, 0].tolist() == keys[row, 0, sees, 0].tolist()
        seen += seq
        assert layer.get_seq_length() == seen


def pairs(hidden: torch.Tensor, places: dict[str, Any]) -> torch.Tensor:
    return torch.cat([hidden, places["position_ids"][..., None]], dim=2)[:, None]


def test_a_cache_that_is_reset_begins_anew() -> None:
    _, told = graph("llama", KvStatic(capacity=96), KvWindow(sinks=2, window=9))
    make = KvWindow.torch_reference(told, single_token=False, module=module("llama"))
    assert make is not None
    cache = make()
    first = cached_steps(module("llama"), cache, drawn(), CHUNKS)
    cache.reset()
    np.testing.assert_array_equal(cached_steps(module("llama"), cache, drawn(), CHUNKS), first)


def test_hooks_leave_caches_of_other_kinds_alone() -> None:
    _, told = graph("llama", KvStatic(capacity=96), KvWindow(sinks=2, window=9))
    _, evicts = graph("llama", KvStatic(capacity=96), KvEvict(budget="20", sinks=2, recent_window=5, pyramid=2.5))
    model, ids = copy.deepcopy(shared("llama")), drawn()
    others = KvEvict.torch_reference(evicts, single_token=False, module=model)
    assert others is not None
    full, fewer = (cached_steps(model, make(), ids, CHUNKS) for make in (DynamicCache, others))
    before = hooks(model)
    for _ in range(2):
        KvWindow.torch_reference(told, single_token=False, module=model)
    assert hooks(model) == before + 2
    np.testing.assert_array_equal(cached_steps(model, DynamicCache(), ids, CHUNKS), full)
    np.testing.assert_array_equal(cached_steps(model, others(), ids, CHUNKS), fewer)


def hooks(model: torch.nn.Module) -> int:
    return sum(len(part._forward_pre_hooks) for part in model.modules())


def test_what_is_no_window_or_is_codes_is_left_to_others() -> None:
    _, static = graph("llama", KvStatic(capacity=96))
    _, told = graph("llama", KvStatic(capacity=96), KvWindow(sinks=2, window=9))
    first, *rest = told.layers
    codes = msgspec.structs.replace(first, key=msgspec.structs.replace(first.key, storage_type="8"))
    assert KvWindow.torch_reference(static, single_token=False, module=module("llama")) is None
    quantised = msgspec.structs.replace(told, layers=(codes, *rest))
    assert KvWindow.torch_reference(quantised, single_token=False, module=module("llama")) is None


@pytest.mark.parametrize(
    ("architecture", "says"),
    [
        (None, "each query sees the sinks elsewhere, of which a cache alone is not told"),
        ("linear", "of 2 layers of the graph 0 attentions were found in the module"),
        ("gpt2", "GPT2Attention is not told positions, by which keys could be made anew"),
        ("bloom", "BloomAttention is not told positions, by which keys could be made anew"),
    ],
)
def test_modules_that_offer_no_such_thing_are_refused(architecture: str | None, says: str) -> None:
    _, told = graph("llama", KvStatic(capacity=96), KvWindow(sinks=2, window=9))
    one = torch.nn.Linear(2, 2) if architecture == "linear" else module(architecture) if architecture is not None else None
    before = hooks(one) if one is not None else 0
    with pytest.raises(ModelError, match=says) as refused:
        KvWindow.torch_reference(told, single_token=False, module=one)
    assert refused.value.hint is not None
    assert one is None or hooks(one) == before


@pytest.mark.parametrize("sinks", [0, 2])
def test_a_cache_that_nothing_is_told_says_so(sinks: int) -> None:
    layer = StreamingLayer(told_layer(sinks=sinks, recent=4, slots=sinks + 4, window=None))
    token, place = torch.zeros(1, 1, 1), {"position_ids": torch.zeros(1, 1)}
    keys = pairs(token, place)
    with pytest.raises(ModelError, match="nothing told what goes into attention"):
        layer.update(keys, keys)
    layer.prepare_step(token, place, pairs)
    layer.update(keys, keys)
    with pytest.raises(ModelError, match="nothing told what goes into attention"):
        layer.update(keys, keys)
    layer.prepare_step(token, place, pairs)
    layer.reset()
    with pytest.raises(ModelError, match="nothing told what goes into attention"):
        layer.update(keys, keys)


class OddAttention(torch.nn.Module):  # type: ignore[misc]
    """An attention whose keys are its hidden states and their place, as it counts them."""

    layer_idx = 0

    def __init__(self, counts: str) -> None:
        super().__init__()
        self.counts = counts

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor | None:
        assert past_key_values is not None
        assert position_ids is not None
        if self.counts == "nothing":
            return None
        if self.counts == "its cache":
            start = past_key_values.get_seq_length()
            position_ids = torch.arange(start, start + hidden_states.shape[1])[None]
        keys = pairs(hidden_states, {"position_ids": position_ids.float()})
        past_key_values.update(keys, keys, self.layer_idx)
        return attention_mask


@pytest.mark.parametrize(
    ("counts", "places", "says"),
    [
        ("its cache", torch.arange(5)[None], "attention makes another key of the same token at the same position"),
        ("nothing", torch.arange(5)[None], "OddAttention appends no keys to its cache"),
        ("its places", torch.zeros(3, 1, 5), r"`position_ids` of attention is \(3, 1, 5\), not \(1, 5, ...\)"),
        ("its places", torch.zeros(2, 5), r"`position_ids` of attention is \(2, 5\), not \(1, 5, ...\)"),
        ("its places", torch.zeros(1, 6), r"`position_ids` of attention is \(1, 6\), not \(1, 5, ...\)"),
        ("its places", torch.zeros(1), r"`position_ids` of attention is \(1,\), not \(1, 5, ...\)"),
    ],
)
def test_attentions_that_make_keys_otherwise_are_refused(counts: str, places: torch.Tensor, says: str) -> None:
    layer = told_layer(sinks=2, recent=4, slots=6, window=None)
    told = KVCacheSpec(layers=(layer,), position_encoding="rope", max_positions=None, padding=False)
    odd, right = OddAttention(counts), OddAttention("its places")
    for one in (odd, right):
        assert KvWindow.torch_reference(told, single_token=False, module=one) is not None
    mask = right(torch.zeros(1, 5, 1), None, torch.arange(5)[None], past_key_values=Cache(layers=[StreamingLayer(layer)]))
    assert mask.shape == (1, 1, 5, 13)
    with pytest.raises(ModelError, match=says):
        odd(torch.zeros(1, 5, 1), position_ids=places, past_key_values=Cache(layers=[StreamingLayer(layer)]))
