"""The residual stream: blocks are found in exports of encoders and decoders of every kind."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
from support import decoders, encoders

from ryzen_compile.ir.load import load
from ryzen_compile.spec.passes import PassContext
from ryzen_passes.fold import Fold
from ryzen_passes.residual_stream import TransformerBlock, find_blocks

ALL_STYLES = [pytest.param(style, marks=pytest.mark.exhaustive) for style in ("dynamo-18", "dynamo-23", "tracer-14-eager")]
PARALLEL = {"gptj", "gpt-neox", "falcon"}
"""Architectures whose MLP runs beside the attention."""


def load_folded(path: Path) -> ir.Model:
    model = load(path)
    Fold().rewrite(model, PassContext(backend="onnxruntime"))
    return model


def check_chain(blocks: list[TransformerBlock], count: int) -> None:
    assert len(blocks) == count
    assert len({block.attention for block in blocks}) == count
    for block, following in zip(blocks, blocks[1:], strict=False):
        assert block.output is following.input
        assert block.input is not block.output


@pytest.mark.parametrize("style", ["tracer-17-sdpa", *ALL_STYLES])
@pytest.mark.parametrize("name", list(encoders.ENCODERS))
def test_the_blocks_of_an_encoder_are_a_chain(name: str, style: str) -> None:
    blocks = find_blocks(load_folded(encoders.export(name, style)))
    check_chain(blocks, encoders.LAYERS)
    assert all(block.middle not in (block.input, block.output) for block in blocks)


@pytest.mark.parametrize("style", ["optimum-sdpa", pytest.param("dynamo-23", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("architecture", sorted({*decoders.ARCHITECTURES} - {"falcon"}))  # torch does not export it
def test_the_blocks_of_a_decoder_are_a_chain(architecture: str, style: str) -> None:
    blocks = find_blocks(load_folded(decoders.export(architecture, style)))
    check_chain(blocks, decoders.LAYERS)
    assert all((block.middle is block.output) == (architecture in PARALLEL) for block in blocks)


def test_a_graph_without_attention_has_no_blocks() -> None:
    x = ir.Value(name="x", shape=ir.Shape([2, 3]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Relu", [x])
    node.outputs[0].name = "y"
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 17}, name="g")
    assert find_blocks(ir.Model(graph, ir_version=10)) == []
