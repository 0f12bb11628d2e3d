"""PyTorch reference of kv-evict: a module with evicting caches agrees with the rewritten graph, far beyond the budget."""

from __future__ import annotations

import functools
import itertools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from support.decoders import VOCABULARY, export, module, torch_steps
from support.kv_oracle import HeadOracle
from support.rewritten_decoders import cache_spec, reference_steps, rewritten

from ryzen_compile.builder.calibrate import calibrate
from ryzen_compile.errors import ModelError
from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.ir.load import load
from ryzen_compile.ir.save import save
from ryzen_compile.registry import find_backend
from ryzen_compile.spec.kv_cache import AppendEvictWrite, CacheTensorSpec, Eviction, KVCacheSpec, LayerCacheSpec
from ryzen_compile.spec.passes import Pass
from ryzen_passes.attention import Attention
from ryzen_passes.kv.evict import KvEvict
from ryzen_passes.kv.evict.torch_reference import EvictingLayer
from ryzen_passes.kv.scoring import TorchScorer, statistics
from ryzen_passes.kv.static import KvStatic

Array = np.ndarray[Any, Any]
TOKENS, BUDGET = 90, 20


def written(architecture: str, path: Path, *passes: Pass) -> tuple[Path, KVCacheSpec]:
    """Write the rewritten decoder to `path`; return the path and the cache specification."""
    model = rewritten(architecture, *passes)
    save(model, path)
    return path, cache_spec(model)


def onnx_steps(path: Path, ids: Array, chunks: Sequence[int]) -> Array:
    """Return the logits (batch, tokens, vocabulary) of the graph at `path`, with bound states."""
    interface = interface_of(load(path))
    dims = {state.input: interface.input(state.input).dims or () for state in interface.states}
    shapes = {name: (len(ids), *(size for size in sizes if isinstance(size, int))) for name, sizes in dims.items()}
    found, at = [], 0
    with find_backend("onnxruntime").open(str(path)) as session:
        steps = session.bind_states(interface.states, shapes)
        for chunk in chunks:
            tokens = ids[:, at : at + chunk]
            found.append(steps.run({"input_ids": tokens, "attention_mask": np.ones_like(tokens)})["logits"])
            at += chunk
        steps.close()
    return np.concatenate(found, axis=1)


def tokens(repeating: bool) -> Array:
    """Return two rows of ids; without repetition, no two keys of a row have norms that are equal up to rounding."""
    random = np.random.default_rng(3)
    if repeating:
        return random.integers(0, VOCABULARY, (2, TOKENS))
    return np.stack([random.permutation(VOCABULARY)[:TOKENS] for _ in range(2)])


@pytest.mark.parametrize("score", ["knorm", "value-norm", "position"])
@pytest.mark.parametrize(
    ("step", "chunks"),
    [(1, [1] * TOKENS), (0, [1] * TOKENS), (0, [7, 1, 30, 1, 1, 9, *[1] * 11, 25, 5]), (0, [TOKENS])],
    ids=["single-token-graph", "single-tokens", "chunks", "one-step"],
)
def test_the_reference_agrees_with_the_rewritten_graph(score: str, step: int, chunks: list[int], tmp_path: Path) -> None:
    evict = KvEvict(score=score, budget=str(BUDGET), sinks=2, recent_window=5)  # type: ignore[arg-type]
    path, spec = written("llama", tmp_path / "decoder.onnx", KvStatic(capacity=96, step=step), evict, Attention())
    ids = tokens(repeating=score == "position")
    found = reference_steps(module("llama"), KvEvict, spec, ids, chunks, single_token=step == 1)
    np.testing.assert_allclose(onnx_steps(path, ids, chunks), found, rtol=0, atol=2e-4)
    if len(chunks) > 1:
        full = torch_steps("llama", ids, chunks)
        assert np.abs(found - full)[:, :BUDGET].max() < 1e-4
        assert np.abs(found - full)[:, 2 * BUDGET :].max(axis=2).min() > 1e-2


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3", "falcon"])
def test_other_architectures_agree(architecture: str, tmp_path: Path) -> None:
    evict = KvEvict(score="value-norm", budget=str(BUDGET), sinks=0, recent_window=1)
    path, spec = written(architecture, tmp_path / "decoder.onnx", KvStatic(capacity=96), evict)
    ids, chunks = tokens(repeating=False), [30, 1, 1, 20, *[1] * 8, 30]
    found = reference_steps(module(architecture), KvEvict, spec, ids, chunks)
    np.testing.assert_allclose(onnx_steps(path, ids, chunks), found, rtol=0, atol=2e-4)


def test_a_single_token_evicts_first_only_in_a_single_token_graph(tmp_path: Path) -> None:
    """A graph for any number of tokens attends to the old slots and the new token."""
    evict = KvEvict(score="knorm", budget=str(BUDGET), sinks=2, recent_window=5)
    _, spec = written("llama", tmp_path / "decoder.onnx", KvStatic(capacity=96), evict)
    ids, chunks = tokens(repeating=False), [1] * TOKENS
    single, any_number = (
        reference_steps(module("llama"), KvEvict, spec, ids, chunks, single_token=single_token)
        for single_token in (True, False)
    )
    assert np.abs(single - any_number)[:, :BUDGET].max() == 0
    assert np.abs(single - any_number)[:, BUDGET:].max() > 1e-2


def test_kv_static_keeps_all_tokens(tmp_path: Path) -> None:
    path, spec = written("llama", tmp_path / "decoder.onnx", KvStatic(capacity=96))
    ids, chunks = tokens(repeating=True), [40, *[1] * 50]
    assert KvEvict.torch_cache_factory(spec, single_token=False) is None
    found = reference_steps(module("llama"), KvStatic, spec, ids, chunks)
    np.testing.assert_allclose(onnx_steps(path, ids, chunks), found, rtol=0, atol=2e-4)
    np.testing.assert_array_equal(found, torch_steps("llama", ids, chunks))


def evicting_layer(slots: int, sinks: int, recent_window: int, *, window: int | None, single_token: bool) -> EvictingLayer:
    """Return an empty layer with three KV heads."""
    side = CacheTensorSpec(state="", update="", cache="", head_size=2, dtype="float32")
    policy = Eviction(
        slots=slots,
        score="value",
        sinks=sinks,
        recent_window=recent_window,
        score_state="",
        position_state="",
        write=AppendEvictWrite(slots=""),
        attended="cache",
    )
    spec = LayerCacheSpec(attention_node="", heads=3, kv_heads=3, key=side, value=side, window=window, policy=policy)
    return EvictingLayer(_ValueScorer(), spec, policy, single_token=single_token)


class _ValueScorer(TorchScorer):
    """The score is the first element of the value."""

    def score_new_tokens(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return values[..., 0]


@pytest.mark.parametrize("seed", range(40))
def test_slots_agree_with_the_oracle(seed: int) -> None:
    """Includes ties, NaN and infinite scores, attention windows, and steps that are longer than the budget."""
    random = np.random.default_rng(seed)
    sinks, recent, spare = ((0, 1, 3), (2, 3, 1), (4, 2, 0))[seed % 3]
    slots = sinks + recent + spare
    window = (None, 4, None, 6, 3)[seed % 5]
    layer = evicting_layer(slots, sinks, recent, window=window, single_token=bool(seed % 2))
    heads, seen = [[HeadOracle(slots, sinks, recent, window) for _ in range(3)] for _ in range(2)], 0
    for count in random.integers(1, 9, 12):
        values = random.integers(-2, 3, (2, 3, count, 2)).astype(np.float32)
        values[values[..., 1] == 0, 0] = random.choice([np.nan, np.inf, -np.inf])
        keys = random.standard_normal((2, 3, count, 5)).astype(np.float32)
        attended, _ = layer.update(torch.from_numpy(keys), torch.from_numpy(values))
        for row, head in np.ndindex(2, 3):
            scores = np.nan_to_num(values[row, head, :, 0], nan=np.finfo(np.float32).min)
            new_tokens = [(seen + n, float(scores[n]), keys[row, head, n], values[row, head, n]) for n in range(count)]
            heads[row][head].append(new_tokens)
            kept = [token for token in heads[row][head].entries if token is not None]
            columns, positions = min(seen + int(count), slots), layer.positions[row, head]
            assert positions.tolist() == heads[row][head].positions()[:columns]
            np.testing.assert_array_equal(layer.keys[row, head][positions >= 0], [token[2] for token in kept])
            np.testing.assert_array_equal(layer.values[row, head][positions >= 0], [token[3] for token in kept])
            assert attended.shape[2] == (columns if seed % 2 and count == 1 else min(seen, slots) + count)
        seen += int(count)
        assert layer.get_seq_length() == seen


CHUNKS = [7, 1, 30, 1, 1, 9, *[1] * 11, 25, 5]
CHUNKINGS = pytest.mark.parametrize(
    ("step", "chunks"),
    [(1, [1] * TOKENS), (0, CHUNKS), (0, [1] * TOKENS)],
    ids=["single-token-graph", "chunks", "single-tokens"],
)


@pytest.mark.parametrize("interval", [0, 1, 3, 20, 64])
@CHUNKINGS
def test_scores_are_recomputed_as_in_the_graph(interval: int, step: int, chunks: list[int], tmp_path: Path) -> None:
    evict = KvEvict(score="keydiff", budget=str(BUDGET), sinks=2, recent_window=5, rescore_interval=interval)
    path, spec = written("llama", tmp_path / "decoder.onnx", KvStatic(capacity=96, step=step), evict, Attention())
    ids = tokens(repeating=False)
    found = reference_steps(module("llama"), KvEvict, spec, ids, chunks, single_token=step == 1)
    np.testing.assert_allclose(onnx_steps(path, ids, chunks), found, rtol=0, atol=2e-4)
    assert {layer.policy.rescore_interval for layer in spec.layers} == {interval}


def test_the_rescore_interval_changes_the_logits(tmp_path: Path) -> None:
    ids, logits = tokens(repeating=False), []
    for interval in (0, 1, 3):
        evict = KvEvict(score="keydiff", budget=str(BUDGET), sinks=2, recent_window=5, rescore_interval=interval)
        _, spec = written("llama", tmp_path / "decoder.onnx", KvStatic(capacity=96, step=1), evict)
        logits.append(reference_steps(module("llama"), KvEvict, spec, ids, [1] * TOKENS, single_token=True)[:, 2 * BUDGET :])
    for one, other in itertools.combinations(logits, 2):
        assert np.abs(one - other).max() > 1e-2


@pytest.fixture(scope="module")
def calibrated_evict(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], KvEvict]:
    """Return a factory of kv-evict with a calibrated score and its statistics for an architecture."""
    folder = tmp_path_factory.mktemp("statistics")
    np.savez(folder / "ids.npz", input_ids=np.random.default_rng(5).integers(0, VOCABULARY, (12, 60)))

    @functools.cache
    def create(architecture: str, score: Literal["kvzap", "triattention"]) -> KvEvict:
        path, evict = (
            str(folder / f"{architecture}.{score}"),
            KvEvict(score=score, budget=str(BUDGET), sinks=2, recent_window=5),
        )
        data = str(folder / "ids.npz")
        calibrate(export(architecture, "optimum-sdpa"), path, pass_spec=f"kv-evict{{score={score},recent-window=5}}", data=data)
        return replace(evict, statistics=path)

    return create


@pytest.mark.parametrize("interval", [0, 3])
@pytest.mark.parametrize("architecture", ["llama", "phi3", "gemma3"])
@CHUNKINGS
def test_triattention_agrees_with_the_graph(
    architecture: str,
    interval: int,
    step: int,
    chunks: list[int],
    calibrated_evict: Callable[[str, str], KvEvict],
    tmp_path: Path,
) -> None:
    evict = replace(calibrated_evict(architecture, "triattention"), rescore_interval=interval)
    path, spec = written(architecture, tmp_path / "decoder.onnx", KvStatic(capacity=96, step=step), evict)
    ids = tokens(repeating=False)
    locations = [Path(evict.statistics)]
    found = reference_steps(module(architecture), KvEvict, spec, ids, chunks, single_token=step == 1, statistics=locations)
    np.testing.assert_allclose(onnx_steps(path, ids, chunks), found, rtol=0, atol=2e-4)


@CHUNKINGS
def test_kvzap_agrees_with_the_graph(
    step: int, chunks: list[int], calibrated_evict: Callable[[str, str], KvEvict], tmp_path: Path
) -> None:
    evict = calibrated_evict("llama", "kvzap")
    path, spec = written("llama", tmp_path / "decoder.onnx", KvStatic(capacity=96, step=step), evict, Attention())
    ids, locations = tokens(repeating=False), [Path(evict.statistics)]
    found = reference_steps(module("llama"), KvEvict, spec, ids, chunks, single_token=step == 1, statistics=locations)
    np.testing.assert_allclose(onnx_steps(path, ids, chunks), found, rtol=0, atol=2e-4)
    assert np.abs(found - torch_steps("llama", ids, chunks))[:, 2 * BUDGET :].max(axis=2).min() > 1e-2


@pytest.mark.parametrize("architecture", ["qwen2", "phi3", "falcon", "gptj"])
def test_hidden_states_of_other_architectures_are_found(
    architecture: str, calibrated_evict: Callable[[str, str], KvEvict], tmp_path: Path
) -> None:
    evict = calibrated_evict(architecture, "kvzap")
    path, spec = written(architecture, tmp_path / "decoder.onnx", KvStatic(capacity=96), evict)
    ids, chunks = tokens(repeating=False), [30, 1, 1, 20, *[1] * 8, 30]
    found = reference_steps(module(architecture), KvEvict, spec, ids, chunks, statistics=[Path(evict.statistics)])
    np.testing.assert_allclose(onnx_steps(path, ids, chunks), found, rtol=0, atol=2e-4)


def test_hooks_do_not_affect_other_caches(calibrated_evict: Callable[[str, str], KvEvict], tmp_path: Path) -> None:
    evict = replace(calibrated_evict("llama", "kvzap"), pyramid=2.0)
    _, spec = written("llama", tmp_path / "decoder.onnx", KvStatic(capacity=96, step=1), evict)
    ids, chunks = tokens(repeating=False), [40, *[1] * 50]
    full = torch_steps("llama", ids, chunks)
    model = module("llama")
    counts = []
    for _ in range(2):
        KvEvict.torch_cache_factory(spec, single_token=True, module=model, statistics=[Path(evict.statistics)])
        counts.append([len(layer.self_attn._forward_pre_hooks) for layer in model.model.layers])
    assert counts[0] == counts[1]
    assert min(counts[0]) >= 1
    np.testing.assert_array_equal(torch_steps("llama", ids, chunks), full)


@pytest.mark.parametrize(
    "evict",
    [
        KvEvict(score="knorm", budget=str(BUDGET), sinks=2, recent_window=5, pyramid=2.5),
        KvEvict(score="keydiff", budget=str(BUDGET), sinks=0, recent_window=3, pyramid=1.4, rescore_interval=4),
    ],
    ids=str,
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral"])
@CHUNKINGS
def test_layers_with_different_budgets_agree(
    architecture: str, evict: KvEvict, step: int, chunks: list[int], tmp_path: Path
) -> None:
    path, spec = written(architecture, tmp_path / "decoder.onnx", KvStatic(capacity=96, step=step), evict, Attention())
    assert len({layer.policy.slots for layer in spec.layers}) == 2
    ids = tokens(repeating=False)
    found = reference_steps(module(architecture), KvEvict, spec, ids, chunks, single_token=step == 1)
    np.testing.assert_allclose(onnx_steps(path, ids, chunks), found, rtol=0, atol=2e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["mistral", "gemma3"])
@CHUNKINGS
def test_sliding_windows_hide_kept_tokens(
    architecture: str, attention: str, step: int, chunks: list[int], tmp_path: Path
) -> None:
    """The budget is less than the window, and heads keep different tokens, so each head has its own mask."""
    evict = KvEvict(score="value-norm", budget="15", sinks=2, recent_window=5)
    path, spec = written(architecture, tmp_path / "decoder.onnx", KvStatic(capacity=96, step=step), evict)
    ids = tokens(repeating=False)
    found = reference_steps(module(architecture, attention), KvEvict, spec, ids, chunks, single_token=step == 1)
    np.testing.assert_allclose(onnx_steps(path, ids, chunks), found, rtol=0, atol=2e-4)
    assert np.abs(found - torch_steps(architecture, ids, chunks))[:, 2 * BUDGET :].max() > 1e-2


@CHUNKINGS
def test_a_budget_that_covers_the_window_changes_nothing(step: int, chunks: list[int], tmp_path: Path) -> None:
    evict = KvEvict(score="value-norm", budget="40", sinks=2, recent_window=5)
    _, spec = written("mistral", tmp_path / "decoder.onnx", KvStatic(capacity=96, step=step, ring_buffers=False), evict)
    ids = tokens(repeating=False)
    found = reference_steps(module("mistral"), KvEvict, spec, ids, chunks, single_token=step == 1)
    np.testing.assert_allclose(found, torch_steps("mistral", ids, chunks), rtol=0, atol=2e-4)


def test_methods_that_need_the_module_are_refused_without_it(
    calibrated_evict: Callable[[str, str], KvEvict], tmp_path: Path
) -> None:
    static = KvStatic(capacity=96)
    evict = calibrated_evict("llama", "kvzap")
    _, by_hidden = written("llama", tmp_path / "decoder.onnx", static, evict)
    _, windows = written("mistral", tmp_path / "decoder.onnx", static, KvEvict(score="knorm", budget="15", recent_window=8))
    with pytest.raises(ModelError, match="scores depend on hidden states, which requires hooks on the module"):
        KvEvict.torch_cache_factory(by_hidden, single_token=False, statistics=[Path(evict.statistics)])
    with pytest.raises(ModelError, match="layers need different attention masks, which requires hooks on the module"):
        KvEvict.torch_cache_factory(windows, single_token=False)
    with pytest.raises(ModelError, match="the graph has 2 attention layers, and 0 attention modules were found in the module"):
        KvEvict.torch_cache_factory(windows, single_token=False, module=torch.nn.Linear(2, 2))


def test_missing_or_changed_statistics_are_refused(calibrated_evict: Callable[[str, str], KvEvict], tmp_path: Path) -> None:
    mine = tmp_path / "zap.safetensors"
    shutil.copy(calibrated_evict("llama", "kvzap").statistics, mine)
    _, spec = written(
        "llama",
        tmp_path / "decoder.onnx",
        KvStatic(capacity=96),
        replace(calibrated_evict("llama", "kvzap"), statistics=str(mine)),
    )
    model, found = module("llama"), statistics.read_statistics(mine)
    renamed = tmp_path / "renamed"
    shutil.copy(mine, renamed)
    for locations in ([mine], [tmp_path], [tmp_path / "absent", renamed]):
        assert KvEvict.torch_cache_factory(spec, single_token=False, module=model, statistics=locations) is not None
    found.tensors["0.bias"] += 1
    found.write(mine)
    with pytest.raises(ModelError, match="`zap.safetensors` differs from the statistics .* that the graph was rewritten with"):
        KvEvict.torch_cache_factory(spec, single_token=False, module=model, statistics=[tmp_path])
    with pytest.raises(ModelError, match="the statistics `zap.safetensors` .* are not found"):
        KvEvict.torch_cache_factory(spec, single_token=False, module=model)
    mine.unlink()
    with pytest.raises(ModelError, match="the statistics `zap.safetensors` .* are not found"):
        KvEvict.torch_cache_factory(spec, single_token=False, module=model, statistics=[tmp_path])
