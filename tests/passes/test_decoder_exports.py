"""Test decoders in every export style: graphs agree with their modules, and known exporter failures still occur."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from support.decoder_matrix import BATCH_ONE_ONLY, EXPORT, EXPORT_FAILURES, cells, exports
from support.decoders import (
    ARCHITECTURES,
    GENAI_ARCHITECTURES,
    LAYERS,
    NO_POSITIONS,
    STYLES,
    VOCABULARY,
    WINDOW,
    cache_names,
    export,
    module,
    onnx_steps,
    torch_steps,
)

Array = np.ndarray[Any, Any]

TOKENS, PROMPT, PADDING = 34, 20, 4
CHUNKS = (PROMPT, 1, 1, 9, 1, 1, 1)
"""A prompt, single tokens and several tokens after a past; in total longer than the sliding window."""

STEPS = (PROMPT, *[1] * (TOKENS - PROMPT))
"""A prompt and single tokens."""

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
"""Export style -> operator -> number of nodes in the llama graph."""


def random_ids(tokens: int = TOKENS) -> Array:
    return np.random.default_rng(0).integers(0, VOCABULARY, (2, tokens))


def chunks_for(style: str) -> tuple[int, ...]:
    export_style = STYLES[style]
    return (TOKENS,) if not export_style.caches else STEPS if export_style.exporter == "builder" else CHUNKS


def padding_mask(style: str) -> Array:
    """Return a mask (2, TOKENS): a row without padding, and one with padding at a place that the style supports.

    The padding precedes the prompt, or is at the end if the graph counts columns or tokens itself.
    """
    mask = np.ones((2, TOKENS), np.int64)
    export_style = STYLES[style]
    start = TOKENS - PADDING if not export_style.caches else PROMPT - PADDING if export_style.exporter == "builder" else 0
    mask[1, start : start + PADDING] = 0
    return mask


def check_close(actual: Array, expected: Array) -> None:
    assert actual.size == expected.size > 0
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("architecture", "style"), cells(EXPORT, without=EXPORT_FAILURES))
def test_a_graph_agrees_with_its_module(architecture: str, style: str) -> None:
    ids, mask, chunks = random_ids(), padding_mask(style), chunks_for(style)
    if (architecture, style) in BATCH_ONE_ONLY:
        with pytest.raises(Exception, match="RotaryEmbedding"):
            onnx_steps(architecture, style, ids, chunks)
        ids, mask = ids[1:], mask[1:]
    check_close(onnx_steps(architecture, style, ids, chunks), torch_steps(architecture, ids, chunks))
    if STYLES[style].mask:
        actual, expected = onnx_steps(architecture, style, ids, chunks, mask), torch_steps(architecture, ids, chunks, mask)
        check_close(actual[mask == 1], expected[mask == 1])
    check_names(architecture, style)


def check_names(architecture: str, style: str) -> None:
    export_style, graph = STYLES[style], onnx.load(export(architecture, style), load_external_data=False).graph
    inputs = {"input_ids", *(cache_names("past_key_values") if export_style.caches else ())}
    inputs |= {"attention_mask"} if export_style.mask else set()
    inputs |= {"position_ids"} if export_style.positions and architecture not in NO_POSITIONS else set()
    assert {value.name for value in graph.input} == inputs
    assert {value.name for value in graph.output} == {"logits", *(cache_names("present") if export_style.caches else ())}


@pytest.mark.parametrize(("architecture", "style"), exports(EXPORT_FAILURES))
def test_known_exporter_failures_still_occur(architecture: str, style: str) -> None:
    import torch

    with pytest.raises(torch.onnx.OnnxExporterError) as caught:
        export(architecture, style)
    error: BaseException | None = caught.value
    messages = []
    while error is not None:
        messages.append(str(error))
        error = error.__cause__
    assert messages[-1] == "SDPA (MHA) requires q_num_heads = kv_num_heads"


@pytest.mark.parametrize(("architecture", "style"), exports(("llama", style) for style in OPS))
def test_a_style_determines_the_operators(architecture: str, style: str) -> None:
    model = onnx.load(export(architecture, style))
    assert model.opset_import[0].version == STYLES[style].opset
    counts = Counter(node.op_type for node in model.graph.node)
    assert {op: counts[op] for op in OPS[style]} == OPS[style]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_is_not_uniform(architecture: str) -> None:
    import torch

    with torch.no_grad():
        weights = module(architecture, "eager")(torch.from_numpy(random_ids()), output_attentions=True).attentions
    assert len(weights) == LAYERS
    for layer in weights:
        largest = layer[:, :, PROMPT:].amax(-1).mean().item()
        assert largest > 5 / TOKENS


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_do_not_depend_on_the_chunks(architecture: str) -> None:
    check_close(torch_steps(architecture, random_ids(), CHUNKS), torch_steps(architecture, random_ids(), (TOKENS,)))


def test_only_a_sliding_window_hides_the_first_token() -> None:
    length = LAYERS * WINDOW + 2
    ids = random_ids(length)
    other = ids.copy()
    other[:, 0] = (ids[:, 0] + 1) % VOCABULARY
    for architecture in ARCHITECTURES:
        first, second = (torch_steps(architecture, tokens, (length - 1, 1))[:, -1] for tokens in (ids, other))
        assert np.array_equal(first, second) == (architecture == "mistral"), architecture


@pytest.mark.parametrize("architecture", GENAI_ARCHITECTURES)
def test_genai_graphs_take_several_tokens_after_a_past_only_with_batch_one(architecture: str) -> None:
    ids = random_ids()
    for style in ("genai", "genai-rotary"):
        check_close(onnx_steps(architecture, style, ids[:1], CHUNKS), torch_steps(architecture, ids[:1], CHUNKS))
        with pytest.raises(Exception, match="batch_size must be 1 when sequence_length > 1 and past context is given"):
            onnx_steps(architecture, style, ids, CHUNKS)
    with pytest.raises(Exception, match="invalid expand shape"):
        onnx_steps(architecture, "genai-mha", ids[:1], CHUNKS)


def test_group_query_attention_reads_only_lengths_from_the_mask() -> None:
    ids, mask = random_ids(), np.ones((2, TOKENS), np.int64)
    mask[1, :PADDING] = 0
    actual, expected = onnx_steps("llama", "genai", ids, STEPS, mask), torch_steps("llama", ids, STEPS, mask)
    check_close(actual[0], expected[0])
    assert np.abs(actual[1, PADDING:] - expected[1, PADDING:]).max() > 0.1
