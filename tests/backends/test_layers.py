"""The report on layers, read from what builders really write. See `test_tensorrt_rtx.py` for live logs."""

from __future__ import annotations

import json

from ryzen_compile.backends.api import AttentionFusion
from ryzen_compile.backends.engine_layers import from_inspector, from_log


def tensor(dtype: str) -> str:
    return (
        f"{{ Name: t, Dimensions: [-1,12,-1,32], Strides: [1], StrideOrder: [0], Datatype: {dtype}, "
        "Format: (Linear) Row major linear format }"
    )


def line(name: str, kind: str, reads: str, writes: str, metadata: str = "", tactic: str = "") -> str:
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [ {tensor(reads)}], Constants: [ {tensor('Float')}], "
        f"Outputs: [ {tensor(writes)}], TacticName: {tactic}, StreamId: 0, Metadata: {metadata}"
    )


LOG = "\n".join(
    [
        "Layers:",
        "Name: shapes, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, Metadata: ",
        line("embed", "kgen", "Int64", "Half"),
        line("indices", "kgen", "Int64", "Int64"),
        line("_gemm_mha_v2_myl0_7", "kgen", "Half", "Half", "[ONNX Layer: a0]\x1f[ONNX Layer: scale]", "_gemm_mha_v2_0xab"),
        line("a1_myl0_8", "gemm", "Half", "Half", "[ONNX Layer: a1]"),
        line("soft, max", "kgen", "Half", "Float", "[ONNX Layer: a1]"),
        "",
        "I/O Tensors:",
        " Name: x, IOMode: Input, DataType: Half, Dimensions: [1], Location: Device, LayerType: kgen",
    ]
)


def test_the_log_is_read_up_to_its_first_empty_line() -> None:
    layers = from_log(LOG, ["a0", "a1"])
    assert layers.total == 6
    assert layers.by_type == {"float16": 3, "float32": 1}
    assert layers.dtype_fraction("float16") == 0.75
    assert layers.source == "builder log"


def test_an_attention_is_fused_where_a_kernel_bears_its_name_and_apart_where_only_others_do() -> None:
    assert from_log(LOG, ["a0", "a1"]).attentions == (
        AttentionFusion(kernel="_gemm_mha_v2", fused=True, nodes=("a0", "scale")),
        AttentionFusion(kernel="gemm + kgen", fused=False, nodes=("a1",)),
    )


def test_a_log_without_layers_reports_none() -> None:
    layers = from_log("Layers:\n", [])
    assert (layers.total, layers.dtype_fraction("float16")) == (0, 0.0)


def test_an_inspector_is_read_the_same() -> None:
    def side(word: str) -> list[dict[str, object]]:
        return [{"Name": "t", "Location": "Device", "Dimensions": [1], "Format/Datatype": f"Row major linear {word} format"}]

    fused = {"Name": "_gemv_mha_v1_myl0_1", "LayerType": "kgen", "Inputs": side("FP16"), "Outputs": side("FP16"),
             "TacticName": "_gemv_mha_v1_0x12_vec", "StreamId": 0, "Metadata": "[ONNX Layer: a0]"}  # fmt: skip
    other = {"Name": "add", "LayerType": "kgen", "Inputs": [{"Datatype": "Float"}], "Outputs": [{"Datatype": "Float"}]}
    layers = from_inspector(json.dumps({"Layers": [fused, other, "only a name"]}), ["a0"])
    assert layers.source == "engine inspector"
    assert layers.total == 3
    assert layers.by_type == {"float16": 1, "float32": 1}
    assert layers.attentions == (AttentionFusion(kernel="_gemv_mha_v1", fused=True, nodes=("a0",)),)
