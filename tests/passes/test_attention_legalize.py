"""Legalization of ONNX Attention by the pass `attention`: the results build on TensorRT and compute the same."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.decomposed_attention import decomposed_attention, random_inputs
from support.onnx_node_cases import op_cases
from support.ort_session import run_as_written

from ryzen_compile.backends.api import BuiltEngine
from ryzen_compile.backends.process import worker
from ryzen_compile.backends.process.worker import Worker
from ryzen_compile.backends.tensorrt_rtx.backend import BACKEND
from ryzen_compile.errors import BackendError
from ryzen_compile.ir.fingerprint import fingerprint
from ryzen_compile.pipeline.pass_manager import run_passes
from ryzen_compile.progress import SilentProgress
from ryzen_compile.registry import properties
from ryzen_compile.spec.passes import PassContext, Refusal
from ryzen_compile.spec.profile import Profile
from ryzen_compile.spec.target import parse_targets
from ryzen_passes.attention import Attention
from ryzen_passes.precision import ConvertPrecision

RTX = PassContext(backend="tensorrt-rtx")
GPUS = parse_targets("sm86,sm89,sm120")


@functools.cache
def node_tests() -> dict[str, tuple[onnx.ModelProto, list[object], list[object]]]:
    """Return the ONNX node tests of Attention by name: model, inputs and outputs."""
    return {case.name: (case.model, *case.data_sets[0]) for case in op_cases("attention") if "expanded" not in case.name}


@pytest.fixture(scope="module")
def rtx() -> Iterator[Worker]:
    with worker.start_worker("tensorrt-rtx") as started:
        yield started


def legalize(proto: onnx.ModelProto, *passes: object, attention: Attention | None = None) -> onnx.ModelProto:
    model = ir.from_proto(proto)
    run_passes(model, [attention or Attention(), *passes], RTX, properties())  # type: ignore[list-item]
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    return after


def build(proto: onnx.ModelProto, folder: Path, rtx: Worker) -> BuiltEngine:
    from ryzen_compile.backends.api import BuildRequest

    path = folder / "model.onnx"
    onnx.save(proto, path)
    dynamic_sizes = {"B": (1, 2, 4), "S": (1, 8, 16), "N": (1, 8, 16)}
    shapes = {
        value.name: [
            tuple(dim.dim_value or dynamic_sizes[dim.dim_param][bound] for dim in value.type.tensor_type.shape.dim)
            for bound in range(3)
        ]
        for value in proto.graph.input
    }
    profile = Profile(
        **{side: {name: bounds[bound] for name, bounds in shapes.items()} for bound, side in enumerate(("min", "opt", "max"))}
    )
    request = BuildRequest(onnx_path=str(path), output=str(folder / "model.plan"), targets=GPUS, profiles=(profile,))
    return BACKEND.build(request, SilentProgress(), worker=rtx)


WITHOUT_BF16 = [name for name in node_tests() if "bf16" not in name]


@pytest.mark.parametrize("name", WITHOUT_BF16)
def test_every_onnx_attention_case_computes_the_same_after_legalization(name: str) -> None:
    before, inputs, expected = node_tests()[name]
    after = legalize(before)
    assert "Attention" not in {node.op_type for node in after.graph.node}
    values = {graph_input.name: np.asarray(array) for graph_input, array in zip(before.graph.input, inputs, strict=True)}
    actual = run_as_written(after, values)
    assert len(actual) == len(expected) > 0
    for actual_output, expected_output in zip(actual, expected, strict=True):
        is_half = actual_output.dtype == np.float16
        np.testing.assert_allclose(actual_output, expected_output, rtol=0, atol=2e-3 if is_half else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(node_tests()))
def test_every_onnx_attention_case_builds(name: str, rtx: Worker, tmp_path: Path) -> None:
    assert build(legalize(node_tests()[name][0]), tmp_path, rtx).size_bytes


REJECTED = ["test_attention_4d_softcap", "test_attention_4d_with_past_and_present", "test_attention_4d_attn_mask_causal_bf16"]


@pytest.mark.parametrize("name", REJECTED)
def test_cases_that_tensorrt_rejects_build_after_legalization(name: str, rtx: Worker, tmp_path: Path) -> None:
    before = node_tests()[name][0]
    with pytest.raises(BackendError):
        build(before, tmp_path, rtx)
    assert build(legalize(before), tmp_path, rtx).size_bytes


@pytest.mark.parametrize("mask", ["none", "added", "Where with the lowest value", "Where with minus infinity"])
@pytest.mark.parametrize("key", ["swapped", "grouped query"])
def test_a_half_precision_attention_is_fused_for_three_gpus(mask: str, key: str, rtx: Worker, tmp_path: Path) -> None:
    proto = legalize(decomposed_attention(mask=mask, key=key, softmax="NaN guard"), ConvertPrecision(to="fp16"))
    built = build(proto, tmp_path, rtx)
    assert built.layers is not None
    assert [(fusion.fused, fusion.nodes) for fusion in built.layers.attentions] == [(True, ("attend",))]


def test_an_fp32_attention_builds_unfused(rtx: Worker, tmp_path: Path) -> None:
    built = build(legalize(decomposed_attention(mask="Where with the lowest value")), tmp_path, rtx)
    assert built.layers is not None
    assert not any(fusion.fused for fusion in built.layers.attentions)


def test_a_strict_attention_builds_fused_or_not_at_all(rtx: Worker, tmp_path: Path) -> None:
    strict, half = Attention(to="tensorrt", strict=True), ConvertPrecision(to="fp16")
    proto = decomposed_attention(mask="Where with the lowest value")
    built = build(legalize(proto, half, attention=strict), tmp_path, rtx)
    assert built.layers is not None
    assert [fusion.fused for fusion in built.layers.attentions] == [True]
    with pytest.raises(BackendError, match="run the pass `attention`, without"):
        build(legalize(proto, attention=strict), tmp_path, rtx)


def test_strict_attention_that_trt_attention_cannot_express_is_refused() -> None:
    proto = onnx.parser.parse_model(LENGTHS.format(D=8, causal=0).replace("is_causal = 0", "softcap = 2.0"))
    model = ir.from_proto(proto)
    before = fingerprint(model)
    outcome = Attention(to="tensorrt", strict=True).rewrite(model, RTX)
    assert isinstance(outcome, Refusal)
    assert "soft-capped" in outcome.reason
    assert outcome.location == "attend"
    assert fingerprint(model) == before


LENGTHS = """
<ir_version: 10, opset_import: ["" : 24]>
lengths (float[B,4,S,{D}] q, float[B,4,N,{D}] k, float[B,4,N,{D}] v, int64[B] lengths) => (float[B,4,S,{D}] y) {{
   [attend] y = Attention <is_causal = {causal}> (q, k, v, , , , lengths) }}
"""


def only_attention(proto: onnx.ModelProto) -> onnx.NodeProto:
    (node,) = [node for node in proto.graph.node if node.op_type == "TRT_Attention"]
    return node


@pytest.mark.parametrize(("width", "causal", "as_lengths"), [(32, 0, True), (36, 0, False), (32, 1, False)])
def test_lengths_stay_an_input_if_a_kernel_supports_them_and_become_a_mask_otherwise(
    width: int, causal: int, as_lengths: bool, rtx: Worker, tmp_path: Path
) -> None:
    before = onnx.parser.parse_model(LENGTHS.format(D=width, causal=causal))
    after = legalize(before)
    inputs = [*only_attention(after).input, "", ""]
    assert (inputs[5] == "lengths") == as_lengths
    assert (inputs[3] == "") == as_lengths
    values = random_inputs(before) | {"lengths": np.array([6, 7])}
    np.testing.assert_allclose(run_as_written(after, values)[0], run_as_written(before, values)[0], rtol=0, atol=1e-5)
    assert build(after, tmp_path, rtx).size_bytes


CAUSAL = """
<ir_version: 10, opset_import: ["" : 23]>
causal (float[B,4,S,8] q, float[B,4,{new},8] k, float[B,4,{new},8] v{more}) => (float[B,4,S,8] y{presents}) {{
   [attend] y{outputs} = Attention <is_causal = 1> (q, k, v{given}) }}
"""


@pytest.mark.parametrize(
    ("new", "more", "given", "kind"),
    [
        ("N", "", "", "upper_left"),
        ("S", ", float[B,4,P,8] pk, float[B,4,P,8] pv", ", , pk, pv", "lower_right"),
        ("N", ", float[B,4,P,8] pk, float[B,4,P,8] pv", ", , pk, pv", "none"),
        ("N", ", bool[S,N] keep", ", keep", "none"),
    ],
)
def test_is_causal_becomes_the_causal_kind_of_trt_attention(new: str, more: str, given: str, kind: str) -> None:
    presents, outputs = (", float[B,4,T,8] nk, float[B,4,T,8] nv", ", nk, nv") if "pk" in more else ("", "")
    before = onnx.parser.parse_model(CAUSAL.format(new=new, more=more, given=given, presents=presents, outputs=outputs))
    after = legalize(before)
    (attribute,) = [item for item in only_attention(after).attribute if item.name == "causal_kind"]
    assert attribute.s.decode() == kind
    text = onnx.printer.to_text(before).replace("[B,4,P,8]", "[B,4,N,8]")
    values = random_inputs(onnx.parser.parse_model(text))
    for actual, expected in zip(run_as_written(after, values), run_as_written(before, values), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_a_dynamic_scale_is_computed_at_run_time() -> None:
    before = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 23]>
        g (float[B,4,S,W] q, float[B,4,S,W] k, float[B,4,S,W] v) => (float[B,4,S,W] y) { y = Attention (q, k, v) }""")
    values = {name: np.random.default_rng(at).normal(size=(2, 4, 5, 16)).astype(np.float32) for at, name in enumerate("qkv")}
    np.testing.assert_allclose(
        run_as_written(legalize(before), values)[0], run_as_written(before, values)[0], rtol=0, atol=1e-5
    )


def test_a_boolean_mask_returns_zero_for_a_fully_masked_row() -> None:
    before = onnx.parser.parse_model(
        CAUSAL.format(new="N", more=", bool[B,1,S,N] keep", given=", keep", presents="", outputs="").replace(
            "is_causal = 1", "is_causal = 0"
        )
    )
    values = random_inputs(before, mask_row=True)
    output = run_as_written(legalize(before), values)[0]
    assert not output[0, :, 2].any()
    np.testing.assert_allclose(output, run_as_written(before, values)[0], rtol=0, atol=1e-5)


def test_the_notes_name_decomposed_nodes_with_the_reason() -> None:
    model = ir.from_proto(node_tests()["test_attention_4d_softcap"][0])
    change = Attention().rewrite(model, RTX)
    assert "1 decomposed" in change.summary
    assert change.notes[0].endswith("decomposed into other ops: its scores are soft-capped")  # type: ignore[union-attr]
    assert not model.functions


def test_a_second_run_changes_nothing() -> None:
    model = ir.from_proto(legalize(decomposed_attention(mask="added")))
    assert not Attention().rewrite(model, RTX)
