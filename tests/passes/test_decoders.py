"""Decoders in every export style: the graph says what the module says, and what an exporter fails on it still fails on."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from support.decoders import (
    ARCHITECTURES,
    BATCH_ONE_ONLY,
    CASES,
    EXPORT_FAILURES,
    GENAI_ARCHITECTURES,
    LAYERS,
    NO_POSITIONS,
    STYLES,
    VOCABULARY,
    WINDOW,
    cache_names,
    case_params,
    export,
    module,
    onnx_steps,
    torch_steps,
)

Array = np.ndarray[Any, Any]

TOKENS, PROMPT, PADDING = 34, 20, 4
CHUNKS = (PROMPT, 1, 1, 9, 1, 1, 1)
"""A prompt, single steps and several tokens over a past; in all more than a window."""

STEPS = (PROMPT, *[1] * (TOKENS - PROMPT))
"""A prompt and single steps."""

OPS = {
    "dynamo-21": {"Softmax": LAYERS, "Attention": 0, "GatherND": 1},
    "dynamo-23": {"Softmax": 0, "Attention": LAYERS, "RotaryEmbedding": 2 * LAYERS},
    "dynamo-23-bare": {"Softmax": 0, "Attention": LAYERS, "RotaryEmbedding": 2 * LAYERS},
    "dynamo-24": {"Softmax": 0, "Attention": LAYERS, "RotaryEmbedding": 0},
    "optimum-sdpa": {"Softmax": LAYERS, "IsNaN": LAYERS, "ScatterND": 0},
    "optimum-eager": {"Softmax": LAYERS, "IsNaN": 0, "ScatterND": 0},
    "optimum-scatter": {"Softmax": LAYERS, "IsNaN": 0, "ScatterND": 1, "Trilu": 1},
    "genai": {"GroupQueryAttention": LAYERS, "MatMul": 5 * LAYERS + 1, "RotaryEmbedding": 0},
    "genai-rotary": {"GroupQueryAttention": LAYERS, "MatMul": 7 * LAYERS + 1, "RotaryEmbedding": 2 * LAYERS},
    "genai-mha": {"MultiHeadAttention": LAYERS, "GroupQueryAttention": 0, "Tile": 1, "RotaryEmbedding": 2 * LAYERS},
    "prefill-21": {"Softmax": LAYERS, "Attention": 0},
}
"""How often some operators stand in the graph of a llama."""


def drawn(tokens: int = TOKENS) -> Array:
    return np.random.default_rng(0).integers(0, VOCABULARY, (2, tokens))


def chunks_of(style: str) -> tuple[int, ...]:
    how = STYLES[style]
    return (TOKENS,) if not how.caches else STEPS if how.exporter == "builder" else CHUNKS


def masked(style: str) -> Array:
    """Return a mask (2, TOKENS): a row of tokens, and one with padding where the style can have it.

    That is before the prompt, but after it where the graph counts columns or tokens itself.
    """
    mask = np.ones((2, TOKENS), np.int64)
    how = STYLES[style]
    start = TOKENS - PADDING if not how.caches else PROMPT - PADDING if how.exporter == "builder" else 0
    mask[1, start : start + PADDING] = 0
    return mask


def agree(got: Array, expected: Array) -> None:
    assert got.size == expected.size > 0
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("architecture", "style"), case_params(pair for pair in CASES if pair not in EXPORT_FAILURES))
def test_a_graph_agrees_with_its_module(architecture: str, style: str) -> None:
    ids, mask, chunks = drawn(), masked(style), chunks_of(style)
    if (architecture, style) in BATCH_ONE_ONLY:
        with pytest.raises(Exception, match="RotaryEmbedding"):
            onnx_steps(architecture, style, ids, chunks)
        ids, mask = ids[1:], mask[1:]
    agree(onnx_steps(architecture, style, ids, chunks), torch_steps(architecture, ids, chunks))
    if STYLES[style].mask:
        got, expected = onnx_steps(architecture, style, ids, chunks, mask), torch_steps(architecture, ids, chunks, mask)
        agree(got[mask == 1], expected[mask == 1])
    bears_the_usual_names(architecture, style)


def bears_the_usual_names(architecture: str, style: str) -> None:
    how, graph = STYLES[style], onnx.load(export(architecture, style), load_external_data=False).graph
    inputs = {"input_ids", *(cache_names("past_key_values") if how.caches else ())}
    inputs |= {"attention_mask"} if how.mask else set()
    inputs |= {"position_ids"} if how.positions and architecture not in NO_POSITIONS else set()
    assert {value.name for value in graph.input} == inputs
    assert {value.name for value in graph.output} == {"logits", *(cache_names("present") if how.caches else ())}


@pytest.mark.parametrize(("architecture", "style"), case_params(EXPORT_FAILURES))
def test_what_an_exporter_fails_on_it_still_fails_on(architecture: str, style: str) -> None:
    import torch

    with pytest.raises(torch.onnx.OnnxExporterError) as failed:
        export(architecture, style)
    error: BaseException | None = failed.value
    said = []
    while error is not None:
        said.append(str(error))
        error = error.__cause__
    assert said[-1] == "SDPA (MHA) requires q_num_heads = kv_num_heads"


@pytest.mark.parametrize(("architecture", "style"), case_params(("llama", style) for style in OPS))
def test_a_style_shows_in_the_operators(architecture: str, style: str) -> None:
    model = onnx.load(export(architecture, style))
    assert model.opset_import[0].version == STYLES[style].opset
    found = Counter(node.op_type for node in model.graph.node)
    assert {op: found[op] for op in OPS[style]} == OPS[style]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_prefers_some_rows(architecture: str) -> None:
    import torch

    with torch.no_grad():
        weights = module(architecture, "eager")(torch.from_numpy(drawn()), output_attentions=True).attentions
    assert len(weights) == LAYERS
    for layer in weights:
        largest = layer[:, :, PROMPT:].amax(-1).mean().item()
        assert largest > 5 / TOKENS


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_chunks_leave_no_trace(architecture: str) -> None:
    agree(torch_steps(architecture, drawn(), CHUNKS), torch_steps(architecture, drawn(), (TOKENS,)))


def test_only_the_window_forgets() -> None:
    long = LAYERS * WINDOW + 2
    ids = drawn(long)
    other = ids.copy()
    other[:, 0] = (ids[:, 0] + 1) % VOCABULARY
    for architecture in ARCHITECTURES:
        first, second = (torch_steps(architecture, these, (long - 1, 1))[:, -1] for these in (ids, other))
        assert np.array_equal(first, second) == (architecture == "mistral"), architecture


@pytest.mark.parametrize("architecture", GENAI_ARCHITECTURES)
def test_what_the_builder_writes_takes_several_tokens_over_a_past_in_a_batch_of_one_at_most(architecture: str) -> None:
    ids = drawn()
    for style in ("genai", "genai-rotary"):
        agree(onnx_steps(architecture, style, ids[:1], CHUNKS), torch_steps(architecture, ids[:1], CHUNKS))
        with pytest.raises(Exception, match="batch_size must be 1 when sequence_length > 1 and past context is given"):
            onnx_steps(architecture, style, ids, CHUNKS)
    with pytest.raises(Exception, match="invalid expand shape"):
        onnx_steps(architecture, "genai-mha", ids[:1], CHUNKS)


def test_group_query_attention_counts_the_mask() -> None:
    ids, mask = drawn(), np.ones((2, TOKENS), np.int64)
    mask[1, :PADDING] = 0
    got, expected = onnx_steps("llama", "genai", ids, STEPS, mask), torch_steps("llama", ids, STEPS, mask)
    agree(got[0], expected[0])
    assert np.abs(got[1, PADDING:] - expected[1, PADDING:]).max() > 0.1
