"""kv methods in torch: a module with their caches does what the rewritten graph does, step by step, far beyond the budget."""

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
from support.decoders import VOCABULARY, cached_steps, export, module, torch_steps
from support.kv_oracle import HeadOracle

from ryzen_compile.errors import ModelError
from ryzen_compile.evaluation.calibrate import calibrate
from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.ir.load import load
from ryzen_compile.ir.save import save
from ryzen_compile.registry import find_backend
from ryzen_compile.spec.kv_cache import CacheTensorSpec, KVCacheSpec, LayerCacheSpec, read_kv_cache_spec
from ryzen_compile.spec.passes import Change, Pass, PassContext
from ryzen_passes.attention import Attention
from ryzen_passes.kv.evict import KvEvict
from ryzen_passes.kv.evict.torch_reference import EvictingLayer, TorchScorer
from ryzen_passes.kv.scorers import statistics
from ryzen_passes.kv.static import KvStatic

Array = np.ndarray[Any, Any]
TOKENS, BUDGET = 90, 20


def rewritten(architecture: str, path: Path, *passes: Pass) -> tuple[Path, KVCacheSpec]:
    """Write the rewritten decoder to `path` and return the map of its caches."""
    model = load(export(architecture, "optimum-sdpa"))
    for pass_ in passes:
        outcome = pass_.rewrite(model, PassContext(backend="onnxruntime"))
        assert isinstance(outcome, Change), outcome
    told = read_kv_cache_spec(model)
    assert told is not None
    save(model, path)
    return path, told


def onnx_steps(path: Path, ids: Array, chunks: Sequence[int]) -> Array:
    """Return the logits (batch, tokens, vocabulary) of the graph at `path`, its states bound to memory."""
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


def method_steps(
    architecture: str,
    pass_: type[Pass],
    told: KVCacheSpec,
    singles: bool,
    ids: Array,
    chunks: Sequence[int],
    attention: str = "sdpa",
) -> Array:
    """Return the same of the module of transformers with the caches of `pass_`."""
    model = module(architecture, attention)
    make = pass_.torch_reference(told, single_token=singles, module=model)
    assert make is not None
    return cached_steps(model, make(), ids, chunks)


def tokens(repeating: bool) -> Array:
    """Return two rows of ids; unless they repeat, no two keys of a row have norms that differ by a rounding alone."""
    random = np.random.default_rng(3)
    if repeating:
        return random.integers(0, VOCABULARY, (2, TOKENS))
    return np.stack([random.permutation(VOCABULARY)[:TOKENS] for _ in range(2)])


@pytest.mark.parametrize("score", ["knorm", "value-norm", "position"])
@pytest.mark.parametrize(
    ("step", "chunks"),
    [(1, [1] * TOKENS), (0, [1] * TOKENS), (0, [7, 1, 30, 1, 1, 9, *[1] * 11, 25, 5]), (0, [TOKENS])],
    ids=["steps-of-one", "ones", "chunks", "at-once"],
)
def test_torch_with_a_method_agrees_with_the_rewritten_graph(score: str, step: int, chunks: list[int], tmp_path: Path) -> None:
    evict = KvEvict(score=score, budget=str(BUDGET), sinks=2, recent_window=5)  # type: ignore[arg-type]
    path, told = rewritten("llama", tmp_path / "decoder.onnx", KvStatic(capacity=96, step=step), evict, Attention())
    ids = tokens(repeating=score == "position")
    found = method_steps("llama", KvEvict, told, step == 1, ids, chunks)
    np.testing.assert_allclose(onnx_steps(path, ids, chunks), found, rtol=0, atol=2e-4)
    if len(chunks) > 1:
        full = torch_steps("llama", ids, chunks)
        assert np.abs(found - full)[:, :BUDGET].max() < 1e-4
        assert np.abs(found - full)[:, 2 * BUDGET :].max(axis=2).min() > 1e-2


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3", "falcon"])
def test_other_architectures_agree(architecture: str, tmp_path: Path) -> None:
    evict = KvEvict(score="value-norm", budget=str(BUDGET), sinks=0, recent_window=1)
    path, told = rewritten(architecture, tmp_path / "decoder.onnx", KvStatic(capacity=96), evict)
    ids, chunks = tokens(repeating=False), [30, 1, 1, 20, *[1] * 8, 30]
    found = method_steps(architecture, KvEvict, told, False, ids, chunks)
    np.testing.assert_allclose(onnx_steps(path, ids, chunks), found, rtol=0, atol=2e-4)


def test_a_step_of_one_sees_what_it_leaves_only_in_a_graph_of_such_steps(tmp_path: Path) -> None:
    """A graph that takes any number attends over the slots as they were and the token behind them."""
    evict = KvEvict(budget=str(BUDGET), sinks=2, recent_window=5)
    _, told = rewritten("llama", tmp_path / "decoder.onnx", KvStatic(capacity=96), evict)
    ids, chunks = tokens(repeating=False), [1] * TOKENS
    alone, any_number = (method_steps("llama", KvEvict, told, singles, ids, chunks) for singles in (True, False))
    assert np.abs(alone - any_number)[:, :BUDGET].max() == 0
    assert np.abs(alone - any_number)[:, BUDGET:].max() > 1e-2


def test_kv_static_keeps_all(tmp_path: Path) -> None:
    path, told = rewritten("llama", tmp_path / "decoder.onnx", KvStatic(capacity=96))
    ids, chunks = tokens(repeating=True), [40, *[1] * 50]
    assert KvEvict.torch_reference(told, single_token=False) is None
    found = method_steps("llama", KvStatic, told, False, ids, chunks)
    np.testing.assert_allclose(onnx_steps(path, ids, chunks), found, rtol=0, atol=2e-4)
    np.testing.assert_array_equal(found, torch_steps("llama", ids, chunks))


def told_layer(**options: Any) -> LayerCacheSpec:
    """Return a layer of three kv-heads, by a score that is given."""
    side = CacheTensorSpec(state="", update="", cache="", head_size=2, dtype="float32")
    return LayerCacheSpec(attention_node="", heads=3, kv_heads=3, key=side, value=side, window=None, method="given", **options)


class _Given(TorchScorer):
    """Scores that are given with the tokens: the first element of a value."""

    def score_new_tokens(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return values[..., 0]


@pytest.mark.parametrize("seed", range(40))
def test_every_slot_holds_what_the_slow_reference_holds(seed: int) -> None:
    """Ties, scores that are no numbers, and steps longer than the budget included."""
    random = np.random.default_rng(seed)
    sinks, recent, spare = ((0, 1, 3), (2, 3, 1), (4, 2, 0))[seed % 3]
    slots = sinks + recent + spare
    layer = EvictingLayer(_Given(), told_layer(slots=slots, sinks=sinks, recent=recent), single_token=bool(seed % 2))
    heads, seen = [[HeadOracle(slots, sinks, recent) for _ in range(3)] for _ in range(2)], 0
    for count in random.integers(1, 9, 12):
        values = random.integers(-2, 3, (2, 3, count, 2)).astype(np.float32)
        values[values[..., 1] == 0, 0] = random.choice([np.nan, np.inf, -np.inf])
        keys = random.standard_normal((2, 3, count, 5)).astype(np.float32)
        before = [[head.positions() for head in row] for row in heads]
        attended, _ = layer.update(torch.from_numpy(keys), torch.from_numpy(values))
        for row, head in np.ndindex(2, 3):
            scores = np.nan_to_num(values[row, head, :, 0], nan=np.finfo(np.float32).min)
            fresh = [(seen + n, float(scores[n]), keys[row, head, n], values[row, head, n]) for n in range(count)]
            heads[row][head].append(fresh)
            held = [token for token in heads[row][head].held if token is not None]
            assert layer.positions[row, head].tolist() == [token[0] for token in held]
            np.testing.assert_array_equal(layer.keys[row, head], [token[2] for token in held])
            np.testing.assert_array_equal(layer.values[row, head], [token[3] for token in held])
            filled = sum(place >= 0 for place in before[row][head])
            assert attended.shape[2] == (len(held) if seed % 2 and count == 1 else filled + count)
        seen += int(count)
        assert layer.get_seq_length() == seen


CHUNKS = [7, 1, 30, 1, 1, 9, *[1] * 11, 25, 5]
FORMS = pytest.mark.parametrize(
    ("step", "chunks"), [(1, [1] * TOKENS), (0, CHUNKS), (0, [1] * TOKENS)], ids=["steps-of-one", "chunks", "ones"]
)


@pytest.mark.parametrize("every", [0, 1, 3, 20, 64])
@FORMS
def test_scores_that_age_are_told_again_as_the_graph_tells_them(
    every: int, step: int, chunks: list[int], tmp_path: Path
) -> None:
    evict = KvEvict(score="keydiff", budget=str(BUDGET), sinks=2, recent_window=5, rescore_interval=every)
    path, told = rewritten("llama", tmp_path / "decoder.onnx", KvStatic(capacity=96, step=step), evict, Attention())
    ids = tokens(repeating=False)
    found = method_steps("llama", KvEvict, told, step == 1, ids, chunks)
    np.testing.assert_allclose(onnx_steps(path, ids, chunks), found, rtol=0, atol=2e-4)
    assert {layer.rescore_interval for layer in told.layers} == {every}


def test_when_scores_are_told_again_makes_a_difference(tmp_path: Path) -> None:
    ids, logits = tokens(repeating=False), []
    for every in (0, 1, 3):
        evict = KvEvict(score="keydiff", budget=str(BUDGET), sinks=2, recent_window=5, rescore_interval=every)
        _, told = rewritten("llama", tmp_path / "decoder.onnx", KvStatic(capacity=96, step=1), evict)
        logits.append(method_steps("llama", KvEvict, told, True, ids, [1] * TOKENS)[:, 2 * BUDGET :])
    for one, other in itertools.combinations(logits, 2):
        assert np.abs(one - other).max() > 1e-2


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], KvEvict]:
    """Make kv-evict by a score and its statistics, fitted to an architecture."""
    folder = tmp_path_factory.mktemp("statistics")
    np.savez(folder / "ids.npz", input_ids=np.random.default_rng(5).integers(0, VOCABULARY, (12, 60)))

    @functools.cache
    def make(architecture: str, score: Literal["kvzap", "triattention"]) -> KvEvict:
        path, evict = (
            str(folder / f"{architecture}.{score}"),
            KvEvict(score=score, budget=str(BUDGET), sinks=2, recent_window=5),
        )
        data = str(folder / "ids.npz")
        calibrate(export(architecture, "optimum-sdpa"), path, pass_spec=f"kv-evict{{score={score},recent-window=5}}", data=data)
        return replace(evict, statistics=path)

    return make


@pytest.mark.parametrize("every", [0, 3])
@pytest.mark.parametrize("architecture", ["llama", "phi3"])
@FORMS
def test_usual_queries_look_from_where_the_graph_has_them(
    architecture: str, every: int, step: int, chunks: list[int], fitted: Callable[[str, str], KvEvict], tmp_path: Path
) -> None:
    evict = replace(fitted(architecture, "triattention"), rescore_interval=every)
    path, told = rewritten(architecture, tmp_path / "decoder.onnx", KvStatic(capacity=96, step=step), evict)
    ids = tokens(repeating=False)
    found = method_steps(architecture, KvEvict, told, step == 1, ids, chunks)
    np.testing.assert_allclose(onnx_steps(path, ids, chunks), found, rtol=0, atol=2e-4)


@FORMS
def test_scores_of_hidden_states_are_those_of_the_graph(
    step: int, chunks: list[int], fitted: Callable[[str, str], KvEvict], tmp_path: Path
) -> None:
    path, told = rewritten(
        "llama", tmp_path / "decoder.onnx", KvStatic(capacity=96, step=step), fitted("llama", "kvzap"), Attention()
    )
    ids = tokens(repeating=False)
    found = method_steps("llama", KvEvict, told, step == 1, ids, chunks)
    np.testing.assert_allclose(onnx_steps(path, ids, chunks), found, rtol=0, atol=2e-4)
    assert np.abs(found - torch_steps("llama", ids, chunks))[:, 2 * BUDGET :].max(axis=2).min() > 1e-2


@pytest.mark.parametrize("architecture", ["qwen2", "phi3", "falcon", "gptj"])
def test_hidden_states_of_other_architectures_are_found(
    architecture: str, fitted: Callable[[str, str], KvEvict], tmp_path: Path
) -> None:
    path, told = rewritten(architecture, tmp_path / "decoder.onnx", KvStatic(capacity=96), fitted(architecture, "kvzap"))
    ids, chunks = tokens(repeating=False), [30, 1, 1, 20, *[1] * 8, 30]
    found = method_steps(architecture, KvEvict, told, False, ids, chunks)
    np.testing.assert_allclose(onnx_steps(path, ids, chunks), found, rtol=0, atol=2e-4)


def test_the_hooks_leave_other_caches_alone(fitted: Callable[[str, str], KvEvict], tmp_path: Path) -> None:
    evict = replace(fitted("llama", "kvzap"), pyramid=2.0)
    _, told = rewritten("llama", tmp_path / "decoder.onnx", KvStatic(capacity=96, step=1), evict)
    ids, chunks = tokens(repeating=False), [40, *[1] * 50]
    full = torch_steps("llama", ids, chunks)
    model = module("llama")
    counts = []
    for _ in range(2):
        KvEvict.torch_reference(told, single_token=True, module=model)
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
@FORMS
def test_layers_that_keep_different_numbers_agree(
    architecture: str, evict: KvEvict, step: int, chunks: list[int], tmp_path: Path
) -> None:
    path, told = rewritten(architecture, tmp_path / "decoder.onnx", KvStatic(capacity=96, step=step), evict, Attention())
    assert len({layer.slots for layer in told.layers}) == 2
    ids = tokens(repeating=False)
    found = method_steps(architecture, KvEvict, told, step == 1, ids, chunks)
    np.testing.assert_allclose(onnx_steps(path, ids, chunks), found, rtol=0, atol=2e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@FORMS
def test_windows_hide_what_lies_behind_them(attention: str, step: int, chunks: list[int], tmp_path: Path) -> None:
    """The budget is wider than the window, and heads keep different tokens: each has a mask of its own."""
    evict = KvEvict(score="value-norm", budget="40", sinks=2, recent_window=5)
    path, told = rewritten("mistral", tmp_path / "decoder.onnx", KvStatic(capacity=96, step=step), evict)
    ids = tokens(repeating=False)
    found = method_steps("mistral", KvEvict, told, step == 1, ids, chunks, attention)
    np.testing.assert_allclose(onnx_steps(path, ids, chunks), found, rtol=0, atol=2e-4)
    assert np.abs(found - torch_steps("mistral", ids, chunks))[:, 2 * BUDGET :].max() > 1e-2


def test_what_needs_the_module_says_so(fitted: Callable[[str, str], KvEvict], tmp_path: Path) -> None:
    static = KvStatic(capacity=96)
    _, by_hidden = rewritten("llama", tmp_path / "decoder.onnx", static, fitted("llama", "kvzap"))
    _, windows = rewritten("mistral", tmp_path / "decoder.onnx", static, KvEvict(budget="40", recent_window=8))
    with pytest.raises(ModelError, match="scores are told of hidden states, of which a cache alone is not told"):
        KvEvict.torch_reference(by_hidden, single_token=False)
    with pytest.raises(ModelError, match="layers differ in what their queries see"):
        KvEvict.torch_reference(windows, single_token=False)
    with pytest.raises(ModelError, match="of 2 layers of the graph 0 attentions were found in the module"):
        KvEvict.torch_reference(windows, single_token=False, module=torch.nn.Linear(2, 2))


def test_statistics_that_are_gone_or_others_are_refused(fitted: Callable[[str, str], KvEvict], tmp_path: Path) -> None:
    mine = tmp_path / "zap.safetensors"
    shutil.copy(fitted("llama", "kvzap").statistics, mine)
    _, told = rewritten(
        "llama", tmp_path / "decoder.onnx", KvStatic(capacity=96), replace(fitted("llama", "kvzap"), statistics=str(mine))
    )
    model, found = module("llama"), statistics.read_statistics(mine)
    assert KvEvict.torch_reference(told, single_token=False, module=model) is not None
    found.tensors["0.bias"] += 1
    found.write(mine)
    with pytest.raises(ModelError, match="zap.safetensors` holds other statistics than the graph was given"):
        KvEvict.torch_reference(told, single_token=False, module=model)
    mine.unlink()
    with pytest.raises(ModelError, match="zap.safetensors` holds no statistics: No such file"):
        KvEvict.torch_reference(told, single_token=False, module=model)
