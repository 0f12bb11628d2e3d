"""The layer report, parsed from recorded builder logs. `test_tensorrt_rtx.py` tests it on real builds."""

from __future__ import annotations

import json

from ryzen_compile.backends.api import AttentionFusion
from ryzen_compile.backends.engine_layers import from_inspector, from_log


def tensor(dtype: str) -> str:
    return (
        f"{{ Name: t, Dimensions: [-1,12,-1,32], Strides: [1], StrideOrder: [0], Datatype: {dtype}, "
        "Format: (Linear) Row major linear format }"
    )


def line(name: str, layer_type: str, input_type: str, output_type: str, metadata: str = "", tactic: str = "") -> str:
    return (
        f"Name: {name}, LayerType: {layer_type}, Inputs: [ {tensor(input_type)}], Constants: [ {tensor('Float')}], "
        f"Outputs: [ {tensor(output_type)}], TacticName: {tactic}, StreamId: 0, Metadata: {metadata}"
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


def test_the_log_is_parsed_up_to_the_first_empty_line() -> None:
    layers = from_log(LOG, ["a0", "a1"])
    assert layers.total == 6
    assert layers.by_type == {"float16": 3, "float32": 1}
    assert layers.dtype_fraction("float16") == 0.75
    assert layers.source == "builder log"


def test_an_attention_is_fused_if_a_fused_kernel_implements_it() -> None:
    assert from_log(LOG, ["a0", "a1"]).attentions == (
        AttentionFusion(kernel="_gemm_mha_v2", fused=True, nodes=("a0", "scale")),
        AttentionFusion(kernel="gemm + kgen", fused=False, nodes=("a1",)),
    )


def test_a_log_without_layers_reports_none() -> None:
    layers = from_log("Layers:\n", [])
    assert (layers.total, layers.dtype_fraction("float16")) == (0, 0.0)


def test_inspector_output_is_parsed_to_the_same_records() -> None:
    def tensors(dtype: str) -> list[dict[str, object]]:
        return [{"Name": "t", "Location": "Device", "Dimensions": [1], "Format/Datatype": f"Row major linear {dtype} format"}]

    fused = {"Name": "_gemv_mha_v1_myl0_1", "LayerType": "kgen", "Inputs": tensors("FP16"), "Outputs": tensors("FP16"),
             "TacticName": "_gemv_mha_v1_0x12_vec", "StreamId": 0, "Metadata": "[ONNX Layer: a0]"}  # fmt: skip
    add = {"Name": "add", "LayerType": "kgen", "Inputs": [{"Datatype": "Float"}], "Outputs": [{"Datatype": "Float"}]}
    layers = from_inspector(json.dumps({"Layers": [fused, add, "only a name"]}), ["a0"])
    assert layers.source == "engine inspector"
    assert layers.total == 3
    assert layers.by_type == {"float16": 1, "float32": 1}
    assert layers.attentions == (AttentionFusion(kernel="_gemv_mha_v1", fused=True, nodes=("a0",)),)
