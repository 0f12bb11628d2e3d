"""TRT_Attention: its declaration, and its body against numpy, on ONNX Runtime and on ONNX's reference evaluator."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from support.decomposed_attention import run

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


def model(mask: str, kind: str, element: str = "float") -> onnx.ModelProto:
    more, given = {
        "none": ("", ""),
        "bool": (f", bool[B,1,{S},{N}] m", ", m"),
        "T": (f", {element}[1,{H},{S},{N}] m", ", m"),
        "lengths": (", int64[B] n", ", , , n"),
    }[mask]
    proto = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 24, "{OP.domain}" : {OP.version}]>
        g ({element}[B,{H},{S},{D}] q, {element}[B,{G},{N},{D}] k, {element}[B,{G},{N},{D}] v{more})
            => ({element}[B,{H},{S},{D}] y) {{
            [attend] y = {OP.domain}.{OP.name} <causal_kind = "{kind}", TRT_decomposable = 1> (q, k, v{given}) }}""")
    # onnx's text cannot say that the last inputs are absent, and its evaluator wants to be told.
    given_inputs = proto.graph.node[0].input
    given_inputs.extend([""] * (len(OP.inputs) - len(given_inputs)))
    proto.functions.append(OP.function_proto())
    onnx.checker.check_model(proto, full_check=True)
    return proto


def values(mask: str, element: str = "float32") -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(1)
    feed: dict[str, np.ndarray[Any, Any]] = {
        name: random.normal(size=shape).astype(element)
        for name, shape in {"q": (B, H, S, D), "k": (B, G, N, D), "v": (B, G, N, D)}.items()
    }
    if mask == "bool":
        feed["m"] = random.random((B, 1, S, N)) < 0.6
        feed["m"][..., 1] = True
    if mask == "T":
        feed["m"] = random.normal(size=(1, H, S, N)).astype(element)
    if mask == "lengths":
        feed["n"] = np.array([4, 5])
    return feed


def expected(feed: dict[str, np.ndarray[Any, Any]], kind: str) -> np.ndarray[Any, Any]:
    query, key, value = (feed[name].astype(np.float64) for name in "qkv")
    scores = query @ np.repeat(key, H // G, axis=1).swapaxes(-1, -2)
    if "m" in feed:
        scores = np.where(feed["m"], scores, -np.inf) if feed["m"].dtype == bool else scores + feed["m"]
    lengths = feed.get("n", np.full(B, N))[:, None, None, None]
    columns, rows = np.arange(N), np.arange(S)[:, None]
    scores = np.where(columns < lengths, scores, -np.inf)
    last = {"none": np.full_like(rows, N), "upper_left": rows, "lower_right": rows + lengths - S}[kind]
    scores = np.where(columns <= last, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    result: np.ndarray[Any, Any] = weights / weights.sum(-1, keepdims=True) @ np.repeat(value, H // G, axis=1)
    return result


@pytest.mark.parametrize(("mask", "kind"), CASES)
def test_the_body_computes_what_the_op_is_declared_to_mean(mask: str, kind: str) -> None:
    feed = values(mask)
    np.testing.assert_allclose(run(model(mask, kind), feed)[0], expected(feed, kind), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("mask", "kind"), CASES)
def test_the_body_runs_in_half_precision_where_every_step_is_rounded(mask: str, kind: str) -> None:
    feed = values(mask, "float16")
    given = ReferenceEvaluator(model(mask, kind, "float16")).run(None, feed)[0]
    assert given.dtype == np.float16
    np.testing.assert_allclose(given, expected(feed, kind), rtol=0, atol=2e-2)


@pytest.mark.parametrize(("mask", "kind"), CASES)
def test_tensorrt_fuses_every_form_of_it(mask: str, kind: str, tmp_path: Path) -> None:
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


def test_the_declaration_and_the_body_agree() -> None:
    assert [value.name for value in OP.ir_function().inputs] == [port.name for port in OP.inputs]
    assert str(OP) == "ryzen::TRT_Attention"
    assert {"tensorrt", "tensorrt-rtx"} == OP.native_backends
