"""PyTorch references of kv-select and kv-compact: modules with query-aware caches agree with the rewritten graphs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from support import tiny_decoder_evaluation
from support.decoder_matrix import architectures
from support.decoders import VOCABULARY, module, torch_steps
from support.rewritten_decoders import cache_spec, rewritten
from support.step_runner import StepRunner
from transformers import DynamicCache

import ryzen_compile as rc
from ryzen_compile.errors import ModelError
from ryzen_compile.ir.save import save
from ryzen_compile.spec.kv_cache import (
    CachePolicy,
    CacheTensorSpec,
    Compaction,
    KVCacheSpec,
    LayerCacheSpec,
    PageSelection,
    Quantization,
)
from ryzen_compile.spec.passes import Pass
from ryzen_passes.kv.compact import KvCompact
from ryzen_passes.kv.compact.torch_reference import compacting_cache_factory
from ryzen_passes.kv.quant import KvQuant
from ryzen_passes.kv.select import KvSelect
from ryzen_passes.kv.select.torch_reference import selecting_cache_factory
from ryzen_passes.kv.static import KvStatic

Array = np.ndarray[Any, Any]
TOKENS, CAPACITY, PAGE, KEEP, BUDGET = 90, 96, 4, 5, 20
SELECT = KvSelect(page_size=PAGE, selected_pages=KEEP)
COMPACT = KvCompact(budget=str(BUDGET), window=5, sinks=2, append_slots=7)
CHUNKS = [7, 1, 30, 1, 1, 4, *[1] * 11, 25, 3, 7]
CHUNKINGS = pytest.mark.parametrize(
    ("steps", "chunks"),
    [
        ((1,), [1] * TOKENS),
        ((0,), [1] * TOKENS),
        ((0,), CHUNKS),
        ((0,), [TOKENS]),
        ((0, 1), CHUNKS),
        ((0, 1), [40, *[1] * 50]),
    ],
    ids=["single-token-graph", "single-tokens", "chunks", "one-step", "both-graphs", "prompt-and-tokens"],
)
"""Step sizes of the graphs (1: single token, 0: any) and the chunks that they are run with."""


@functools.cache
def rewritten_graph(architecture: str, step: int, *passes: Pass) -> tuple[ir.Model, KVCacheSpec]:
    """Return a rewritten decoder for steps of `step` tokens (0: any number), and its cache specification."""
    model = rewritten(architecture, KvStatic(ring_buffers=False, capacity=CAPACITY, step=step), *passes)
    return model, cache_spec(model)


def spans(chunks: Iterable[int]) -> Iterator[tuple[int, int]]:
    return itertools.pairwise(itertools.accumulate(chunks, initial=0))


def graph_steps(
    architecture: str, steps: Sequence[int], method: Pass, ids: Array, chunks: Sequence[int]
) -> Iterator[tuple[Array, dict[str, Array]]]:
    """Yield the logits (batch, chunk, vocabulary) and the states after each step; single tokens use the single-token graph."""
    runs = {step: StepRunner(rewritten_graph(architecture, step, method)[0], len(ids)) for step in steps}
    states = runs[steps[0]].states
    for start, end in spans(chunks):
        run = runs[1 if end - start == 1 and 1 in runs else 0]
        run.states = states
        outputs, states = run.step(ids[:, start:end]), run.states
        yield outputs["logits"], {state.name: states[state.input] for state in run.interface.states}


def module_steps(model: torch.nn.Module, cache: Any, ids: Array, chunks: Sequence[int]) -> Iterator[Array]:
    """Yield the logits of each step of a module over `cache`."""
    for start, end in spans(chunks):
        positions = torch.arange(start, end).expand(len(ids), end - start)
        with torch.no_grad():
            out = model(torch.from_numpy(ids[:, start:end]), past_key_values=cache, use_cache=True, position_ids=positions)
        yield out.logits.numpy()


def method_steps(
    architecture: str, steps: Sequence[int], method: Pass, ids: Array, chunks: Sequence[int], attention: str = "sdpa"
) -> Iterator[tuple[Array, Any]]:
    """Yield the logits of each step of the module with the caches of `method`, and the cache."""
    model = module(architecture, attention)
    create = method.torch_cache_factory(
        rewritten_graph(architecture, steps[0], method)[1], single_token=1 in steps, module=model
    )
    assert create is not None
    cache = create()
    for logits in module_steps(model, cache, ids, chunks):
        yield logits, cache


def joined(steps: Iterable[tuple[Array, Any]]) -> Array:
    return np.concatenate([logits for logits, _ in steps], axis=1)


def tokens() -> Array:
    """Return two rows of ids without repetition, so that no two keys of a row differ only in their positions."""
    random = np.random.default_rng(3)
    return np.stack([random.permutation(VOCABULARY)[:TOKENS] for _ in range(2)])


@pytest.mark.parametrize("score", ["bound", "cosine"])
@CHUNKINGS
def test_a_query_reads_the_same_pages_as_in_the_graph(score: Any, steps: tuple[int, ...], chunks: list[int]) -> None:
    select, ids = KvSelect(page_size=PAGE, selected_pages=KEEP, page_score=score), tokens()
    found = joined(method_steps("llama", steps, select, ids, chunks))
    np.testing.assert_allclose(joined(graph_steps("llama", steps, select, ids, chunks)), found, rtol=0, atol=2e-4)
    far = np.abs(found - torch_steps("llama", ids, chunks))
    assert far[:, : PAGE * KEEP].max() < 1e-4
    single_tokens = [start for start, end in spans(chunks) if end - start == 1 and start > 2 * PAGE * KEEP]
    if 1 in steps:
        assert far[:, single_tokens].max(axis=2).min() > 1e-2
    else:
        assert far.max() < 1e-4


@pytest.mark.parametrize("keep", [1, 2, 9])
@pytest.mark.parametrize("architecture", architectures("mistral", "gpt2", "gpt-neox", "qwen3", "gemma", "phi3"))
def test_pages_of_other_architectures(architecture: str, keep: int) -> None:
    """Mistral's sliding window hides whole pages and a part of one page."""
    select, ids, chunks = KvSelect(page_size=PAGE, selected_pages=keep), tokens(), [13, *[1] * 30, 9, *[1] * 38]
    found = joined(method_steps(architecture, (0, 1), select, ids, chunks, "eager" if keep == 2 else "sdpa"))
    np.testing.assert_allclose(joined(graph_steps(architecture, (0, 1), select, ids, chunks)), found, rtol=0, atol=2e-4)


def test_pages_of_one_token_and_windows_within_a_page() -> None:
    ids, chunks = tokens(), [1] * TOKENS
    for select in (KvSelect(page_size=1, selected_pages=6), KvSelect(page_size=32, selected_pages=2, page_score="cosine")):
        found = joined(method_steps("mistral", (1,), select, ids, chunks))
        np.testing.assert_allclose(joined(graph_steps("mistral", (1,), select, ids, chunks)), found, rtol=0, atol=2e-4)


def check_compact(
    architecture: str,
    compact: KvCompact,
    steps: tuple[int, ...],
    chunks: Sequence[int],
    ids: Array,
    attention: str = "sdpa",
) -> Array:
    """Compare logits, positions and scores after every step with those of the graph; return the logits."""
    spec, found = rewritten_graph(architecture, steps[0], compact)[1], []
    ours = method_steps(architecture, steps, compact, ids, chunks, attention)
    for (logits, cache), (expected, states) in zip(ours, graph_steps(architecture, steps, compact, ids, chunks), strict=True):
        np.testing.assert_allclose(expected, logits, rtol=0, atol=2e-4)
        found.append(logits)
        firsts: dict[str | None, int] = {}
        for layer, one in zip(cache.layers, spec.layers, strict=True):
            first = firsts.get(one.policy.position_state, 0)
            firsts[one.policy.position_state] = first + one.kv_heads
            rows = slice(first, first + one.kv_heads), slice(layer.positions.shape[2])
            positions = states[one.policy.position_state][:, first : first + one.kv_heads]
            assert (positions >= 0).sum() == (layer.positions >= 0).sum()
            np.testing.assert_array_equal(layer.positions, states[one.policy.position_state][:, *rows])
            np.testing.assert_allclose(layer.scores, states[one.policy.score_state][:, *rows], rtol=0, atol=1e-5)
            np.testing.assert_allclose(layer.keys, states[one.key.state or ""][:, :, rows[1]], rtol=0, atol=1e-4)
    return np.concatenate(found, axis=1)


@CHUNKINGS
def test_the_kept_tokens_are_those_of_the_graph(steps: tuple[int, ...], chunks: list[int]) -> None:
    ids = tokens()
    found = check_compact("llama", COMPACT, steps, chunks, ids)
    far = np.abs(found - torch_steps("llama", ids, chunks))
    assert far[:, :BUDGET].max() < 1e-4
    if len(chunks) > 1:
        assert far[:, -3:].max(axis=2).min() > 1e-2
    else:
        assert far.max() < 1e-4


OTHERS = [
    KvCompact(budget="20", window=3, sinks=0, append_slots=2, pooling=1),
    KvCompact(budget="24", window=6, sinks=4, append_slots=5, pooling=3, pyramid=2.0),
    KvCompact(budget="45", window=4, sinks=1, append_slots=9, pooling=5),
]


@pytest.mark.parametrize("compact", OTHERS, ids=str)
@pytest.mark.parametrize("architecture", architectures("mistral", "gpt2", "gpt-neox", "qwen3", "gemma"))
def test_kept_tokens_of_other_architectures(architecture: str, compact: KvCompact) -> None:
    """Tokens outside of Mistral's window get no attention: many scores are equal, and the order of the slots decides."""
    for steps, chunks in (((0, 1), CHUNKS), ((0,), [11, 2, 30, 1, 9, *[1] * 12, 25])):
        check_compact(architecture, compact, steps, chunks, tokens(), "sdpa" if compact.sinks else "eager")


@pytest.mark.parametrize(
    ("method", "steps", "chunks", "within"),
    [(SELECT, (1,), [1] * 50, PAGE * KEEP), (COMPACT, (0, 1), [15, *[1] * 35], BUDGET + 7)],
    ids=["select", "compact"],
)
def test_hooks_do_not_affect_other_caches(method: Pass, steps: tuple[int, ...], chunks: list[int], within: int) -> None:
    model, ids = module("llama"), tokens()[:, :50]
    full = torch_steps("llama", ids, chunks)
    spec = rewritten_graph("llama", steps[0], method)[1]
    for _ in range(2):
        create = method.torch_cache_factory(spec, single_token=True, module=model)
    assert create is not None
    before = [(len(one.self_attn._forward_pre_hooks), len(one.self_attn._forward_hooks)) for one in model.model.layers]
    method.torch_cache_factory(spec, single_token=True, module=model)
    assert before == [(len(one.self_attn._forward_pre_hooks), len(one.self_attn._forward_hooks)) for one in model.model.layers]
    one, other, shown = create(), DynamicCache(config=model.config), []
    for start, end in spans(chunks):
        for cache in (one, other):
            with torch.no_grad():
                out = model(torch.from_numpy(ids[:, start:end]), past_key_values=cache, use_cache=True)
            assert model.config._attn_implementation == "sdpa"
            shown.append(out.logits.numpy())
    np.testing.assert_array_equal(np.concatenate(shown[1::2], axis=1), full)
    far = np.abs(np.concatenate(shown[::2], axis=1) - full)
    assert far[:, :within].max() < 1e-4
    assert far[:, within + 1 :].max() > 1e-2
    one.reset()
    again = np.concatenate([*module_steps(model, one, ids, chunks)], axis=1)
    np.testing.assert_array_equal(again, np.concatenate(shown[::2], axis=1))


def test_a_failed_step_restores_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = module("llama"), tokens()[:, :12]
    create = SELECT.torch_cache_factory(rewritten_graph("llama", 1, SELECT)[1], single_token=True, module=model)
    assert create is not None
    with monkeypatch.context() as patched:
        patched.setattr(model.model.layers[1].self_attn.o_proj, "forward", None)
        with pytest.raises(TypeError, match="NoneType"):
            [*module_steps(model, create(), ids, [12])]
    assert model.config._attn_implementation == "sdpa"
    np.testing.assert_array_equal(
        np.concatenate([*module_steps(model, DynamicCache(), ids, [12])]), torch_steps("llama", ids, [12])
    )


def spec_with(policy: CachePolicy) -> KVCacheSpec:
    """Return the specification of two layers with `policy`."""
    side = CacheTensorSpec(state="", update="", cache="", head_size=16, dtype="float32")
    layer = LayerCacheSpec(attention_node="", heads=4, kv_heads=2, key=side, value=side, window=None, policy=policy)
    return KVCacheSpec(layers=(layer, layer), position_encoding="rope", max_positions=None, padding=False)


SELECTED = spec_with(
    PageSelection(slots=64, score="bound", page_size=4, selected_pages=16, summary_states=(), attended="other")
)
COMPACTED = spec_with(
    Compaction(
        slots=64,
        sinks=0,
        recent_window=4,
        append_slots=8,
        pooling=1,
        score_state="",
        position_state="",
        write=None,
        attended="past-then-update",
    )
)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_softcap_and_scale_of_the_module_are_applied(softcap: float | None) -> None:
    """The result is exact while all tokens are kept and read."""
    config = transformers.Gemma2Config(
        **{"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16},
        num_attention_heads=4,
        num_key_value_heads=2,
        query_pre_attn_scalar=3,
        pad_token_id=None,
        attn_logit_softcapping=softcap,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model, ids, chunks = transformers.Gemma2ForCausalLM(config).eval(), tokens()[:, :40], [11, *[1] * 9, 20]
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3)
    full = np.concatenate([*module_steps(model, DynamicCache(), ids, chunks)], axis=1)
    for create in (
        selecting_cache_factory(SELECTED, single_token=True, module=model),
        compacting_cache_factory(COMPACTED, single_token=False, module=model),
    ):
        found = np.concatenate([*module_steps(model, create(), ids, chunks)], axis=1)
        np.testing.assert_allclose(found, full, rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", ["falcon", "gptj", "bloom"])
@pytest.mark.parametrize("spec", [SELECTED, COMPACTED], ids=["select", "compact"])
def test_modules_without_attention_functions_are_refused(architecture: str, spec: KVCacheSpec) -> None:
    pass_ = KvSelect if spec is SELECTED else KvCompact
    with pytest.raises(ModelError, match=r"depends on the queries, which \w+Attention does not expose") as refusal:
        pass_.torch_cache_factory(spec, single_token=True, module=module(architecture))
    assert "compare with the PyTorch module and a full cache" in (refusal.value.hint or "")


def test_attention_that_ignores_its_configuration_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A custom module may declare that it calls the function of its configuration, and not do it."""
    model = module("gptj")
    monkeypatch.setattr(type(model), "_supports_attention_backend", True)
    create = KvCompact.torch_cache_factory(COMPACTED, single_token=False, module=model)
    assert create is not None
    with pytest.raises(ModelError, match="GPTJAttention does not call the attention function of its configuration"):
        [*module_steps(model, create(), tokens(), [5])]
    assert model.config._attn_implementation == "eager"
    assert len([*module_steps(model, DynamicCache(), tokens(), [5])]) == 1


def test_attention_with_unsupported_arguments_is_refused() -> None:
    model, ids = module("llama"), torch.from_numpy(tokens()[:, :5])
    create = KvCompact.torch_cache_factory(COMPACTED, single_token=False, module=model)
    assert create is not None
    with torch.no_grad(), pytest.raises(ModelError, match="LlamaAttention passes `s_aux` to attention, which is not supported"):
        model(ids, past_key_values=create(), use_cache=True, s_aux=torch.zeros(4))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("pass_", "spec"),
    [(KvSelect, SELECTED), (KvCompact, COMPACTED)],
    ids=["select", "compact"],
)
def test_specifications_without_a_reference_are_refused(pass_: type[Pass], spec: KVCacheSpec) -> None:
    model = module("llama")
    with pytest.raises(ModelError, match="depends on the queries, which requires hooks on the module") as refusal:
        pass_.torch_cache_factory(spec, single_token=True)
    assert refusal.value.hint == "pass the decoder as `module`"
    with pytest.raises(ModelError, match="the graph has 2 attention layers, and 0 attention modules were found in the module"):
        pass_.torch_cache_factory(spec, single_token=True, module=torch.nn.Linear(2, 2))
    layer = spec.layers[0]
    key = msgspec.structs.replace(layer.key, quantization=Quantization(storage_type="8", scale_state=""))
    codes = msgspec.structs.replace(spec, layers=(msgspec.structs.replace(layer, key=key),) * 2)
    for single_token in (False, True):
        assert pass_.torch_cache_factory(codes, single_token=single_token, module=model) is None
        with pytest.raises(
            ModelError, match=f"quantized caches with the method `{layer.policy.method}` have no Transformers equivalent"
        ):
            KvQuant.torch_cache_factory(codes, single_token=single_token, module=model)
    others: tuple[type[Pass], ...] = (KvSelect, KvCompact, KvQuant, KvStatic)
    assert [other.torch_cache_factory(spec, single_token=True, module=model) for other in others if other is not pass_] == [
        None
    ] * 3


def test_a_graph_for_any_step_reads_all_tokens_and_needs_no_module() -> None:
    create = KvSelect.torch_cache_factory(SELECTED, single_token=False)
    assert create is not None
    assert isinstance(create(), DynamicCache)


@pytest.mark.parametrize("method", [SELECT, COMPACT], ids=str)
@pytest.mark.parametrize("chunk", [1, 8])
def test_evaluate_separates_the_method_from_the_rewrite(method: Pass, chunk: int, tmp_path: Path) -> None:
    path = tmp_path / "decoder.onnx"
    save(rewritten_graph("llama", int(chunk == 1), method)[0], path)
    result = rc.evaluate(
        path,
        baseline=tiny_decoder_evaluation.recipe(),
        documents=2,
        tokens=60,
        questions=0,
        continuations=0,
        chunk_size=chunk,
    )
    assert result.method.endswith(", in torch")
    found = {one.name: one for one in result.results}
    assert found["rewrite-agreement"].candidate.value == 1
    assert found["rewrite-max-abs"].candidate.value < 1e-4
    assert found["agreement"].method is not None
    assert found["agreement"].method.value == 1 if method is SELECT and chunk > 1 else found["agreement"].method.value < 0.9
