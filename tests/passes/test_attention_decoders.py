"""The pass `attention` on exported decoders: all outputs are unchanged, also those of padding, whose queries see no key."""

from __future__ import annotations

import numpy as np
import pytest
from support.decoder_matrix import exports
from support.decoders import LAYERS, VOCABULARY, cache_names, cache_size, export, positions
from support.ort_session import Array, open_session

from ryzen_compile.ir.load import load
from ryzen_compile.pipeline.pass_manager import run_passes
from ryzen_compile.registry import find_pass, properties
from ryzen_compile.spec.passes import PassContext
from ryzen_passes.attention import Attention

PAST, SEQ, PADDING = 5, 4, 7
CELLS = [
    (architecture, style)
    for architecture in ("llama", "bloom", "falcon", "phi3")
    for style in ("optimum-sdpa", "optimum-scatter")
]


def padded_inputs(architecture: str) -> dict[str, Array]:
    """Return random inputs of two sequences; in the first, the past and the first new tokens are padding."""
    rng = np.random.default_rng(0)
    mask = np.ones((2, PAST + SEQ), np.int64)
    mask[0, :PADDING] = 0
    heads, width = cache_size(architecture)
    caches = {name: rng.normal(size=(2, heads, PAST, width)).astype(np.float32) for name in cache_names("past_key_values")}
    ids = rng.integers(0, VOCABULARY, (2, SEQ))
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)[:, PAST:], **caches}


@pytest.mark.parametrize(
    ("attention", "backend"),
    [
        (Attention(), "onnxruntime"),
        (Attention(to="onnx"), "onnxruntime"),
        (Attention(to="tensorrt"), "tensorrt-rtx"),
    ],
    ids=str,
)
@pytest.mark.parametrize(("architecture", "style"), exports(CELLS))
def test_padding_keeps_its_outputs(architecture: str, style: str, attention: Attention, backend: str) -> None:
    before = load(export(architecture, style))
    after = before.clone()
    run_passes(after, [find_pass("fold")(), attention], PassContext(backend=backend), properties())
    if attention.to != "auto":
        assert sum(node.op_type in ("Attention", "TRT_Attention") for node in after.graph) == LAYERS
    sessions = [open_session(model, optimizations="ORT_DISABLE_ALL") for model in (before, after)]
    values = padded_inputs(architecture)
    inputs = {entry.name: values[entry.name] for entry in sessions[0].get_inputs()}
    names = [entry.name for entry in sessions[0].get_outputs()]
    assert {*cache_names("present")} < {*names}
    expected, actual = (session.run(names, inputs) for session in sessions)
    for name, expected_output, actual_output in zip(names, expected, actual, strict=True):
        np.testing.assert_allclose(actual_output, expected_output, rtol=0, atol=1e-4, err_msg=name)
