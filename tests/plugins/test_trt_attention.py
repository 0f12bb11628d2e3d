"""TRT_Attention: its declaration, and its reference against numpy on ONNX Runtime and ONNX's reference evaluator."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from support.ort_session import run_as_written

from ryzen_compile.backends.api import BuildRequest
from ryzen_compile.backends.tensorrt_rtx.backend import BACKEND
from ryzen_compile.progress import SilentProgress
from ryzen_compile.registry import find_op
from ryzen_compile.spec.profile import Profile
from ryzen_compile.spec.target import parse_targets

OP = find_op("TRT_Attention")
B, H, G, S, N, D = 2, 4, 2, 3, 5, 32

MASKS = ["none", "bool", "T", "lengths"]
KINDS = ["none", "upper_left", "lower_right"]
CASES = [(mask, kind) for mask, kind in itertools.product(MASKS, KINDS) if kind == "none" or mask in ("none", "lengths")]


def model(mask: str, kind: str, dtype: str = "float") -> onnx.ModelProto:
    extra_inputs, extra_arguments = {
        "none": ("", ""),
        "bool": (f", bool[B,1,{S},{N}] m", ", m"),
        "T": (f", {dtype}[1,{H},{S},{N}] m", ", m"),
        "lengths": (", int64[B] n", ", , , n"),
    }[mask]
    proto = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 24, "{OP.domain}" : {OP.version}]>
        g ({dtype}[B,{H},{S},{D}] q, {dtype}[B,{G},{N},{D}] k, {dtype}[B,{G},{N},{D}] v{extra_inputs})
            => ({dtype}[B,{H},{S},{D}] y) {{
            [attend] y = {OP.domain}.{OP.name} <causal_kind = "{kind}", TRT_decomposable = 1> (q, k, v{extra_arguments}) }}""")
    # ONNX's text format cannot express absent trailing inputs, but its reference evaluator requires them.
    node_inputs = proto.graph.node[0].input
    node_inputs.extend([""] * (len(OP.inputs) - len(node_inputs)))
    proto.functions.append(OP.function_proto())
    onnx.checker.check_model(proto, full_check=True)
    return proto


def values(mask: str, dtype: str = "float32") -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(1)
    inputs: dict[str, np.ndarray[Any, Any]] = {
        name: random.normal(size=shape).astype(dtype)
        for name, shape in {"q": (B, H, S, D), "k": (B, G, N, D), "v": (B, G, N, D)}.items()
    }
    if mask == "bool":
        inputs["m"] = random.random((B, 1, S, N)) < 0.6
        inputs["m"][..., 1] = True
    if mask == "T":
        inputs["m"] = random.normal(size=(1, H, S, N)).astype(dtype)
    if mask == "lengths":
        inputs["n"] = np.array([4, 5])
    return inputs


def expected(inputs: dict[str, np.ndarray[Any, Any]], kind: str) -> np.ndarray[Any, Any]:
    query, key, value = (inputs[name].astype(np.float64) for name in "qkv")
    scores = query @ np.repeat(key, H // G, axis=1).swapaxes(-1, -2)
    if "m" in inputs:
        scores = np.where(inputs["m"], scores, -np.inf) if inputs["m"].dtype == bool else scores + inputs["m"]
    lengths = inputs.get("n", np.full(B, N))[:, None, None, None]
    columns, rows = np.arange(N), np.arange(S)[:, None]
    scores = np.where(columns < lengths, scores, -np.inf)
    last = {"none": np.full_like(rows, N), "upper_left": rows, "lower_right": rows + lengths - S}[kind]
    scores = np.where(columns <= last, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    result: np.ndarray[Any, Any] = weights / weights.sum(-1, keepdims=True) @ np.repeat(value, H // G, axis=1)
    return result


@pytest.mark.parametrize(("mask", "kind"), CASES)
def test_the_reference_matches_numpy(mask: str, kind: str) -> None:
    inputs = values(mask)
    np.testing.assert_allclose(run_as_written(model(mask, kind), inputs)[0], expected(inputs, kind), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("mask", "kind"), CASES)
def test_the_reference_runs_in_half_precision_with_rounded_intermediates(mask: str, kind: str) -> None:
    inputs = values(mask, "float16")
    output = ReferenceEvaluator(model(mask, kind, "float16")).run(None, inputs)[0]
    assert output.dtype == np.float16
    np.testing.assert_allclose(output, expected(inputs, kind), rtol=0, atol=2e-2)


@pytest.mark.parametrize(("mask", "kind"), CASES)
def test_tensorrt_fuses_every_variant(mask: str, kind: str, tmp_path: Path) -> None:
    onnx.save(model(mask, kind, "float16"), tmp_path / "op.onnx")
    shapes = {
        entry.name: tuple(dim.dim_value or B for dim in entry.type.tensor_type.shape.dim)
        for entry in model(mask, kind, "float16").graph.input
    }
    request = BuildRequest(
        onnx_path=str(tmp_path / "op.onnx"),
        output=str(tmp_path / "op.plan"),
        targets=parse_targets("sm86,sm89,sm120"),
        profiles=(Profile(min=shapes, opt=shapes, max=shapes),),
    )
    built = BACKEND.build(request, SilentProgress())
    assert built.layers is not None
    assert [(fusion.fused, fusion.nodes) for fusion in built.layers.attentions] == [(True, ("attend",))]


def test_the_declaration_and_the_reference_agree() -> None:
    assert [value.name for value in OP.ir_function().inputs] == [param.name for param in OP.inputs]
    assert str(OP) == "ryzen::TRT_Attention"
