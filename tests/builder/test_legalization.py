"""Legalization passes of a build: they are added where a backend needs them, after the passes that treat all types alike."""

from __future__ import annotations

import pytest

from ryzen_compile.builder.default_pipelines import pipeline_for
from ryzen_compile.spec.dtypes import Precision
from ryzen_compile.spec.legalization_pass import GraphContents

FLOAT64 = GraphContents(element_types=("float64", "int64"))
QUANTIZED_FLOAT64 = GraphContents(element_types=("float64", "uint8"), ops=("::DequantizeLinear",))


@pytest.mark.parametrize(
    ("passes", "precision", "contents", "expected"),
    [
        (None, None, FLOAT64, "fold+demote-float64+attention"),
        (None, "fp16", FLOAT64, "fold+demote-float64+attention+precision.to-fp16"),
        ("none", None, FLOAT64, "demote-float64"),
        ("attention,fold", None, FLOAT64, "demote-float64+attention+fold"),
        ("attention,demote-float64", None, FLOAT64, "attention+demote-float64"),
        ("fold", None, QUANTIZED_FLOAT64, "fold+demote-float64+simulate-quantization"),
        ("fold", None, GraphContents(element_types=("float32",), ops=("::MatMul",)), "fold"),
    ],
)
def test_a_backend_that_needs_legalization_passes_gets_them(
    passes: str | None, precision: Precision | None, contents: GraphContents, expected: str
) -> None:
    pipeline = pipeline_for("tensorrt-rtx", passes=passes, precision=precision, source_half_precision=None, contents=contents)
    assert pipeline.id == expected


def test_the_portable_variant_keeps_the_types_of_the_model() -> None:
    pipeline = pipeline_for(
        "onnxruntime", passes="fold", precision=None, source_half_precision=None, contents=QUANTIZED_FLOAT64
    )
    assert (pipeline.id, pipeline.diagnostics) == ("fold", ())


def test_every_added_pass_is_reported_with_the_reason() -> None:
    pipeline = pipeline_for(
        "tensorrt-rtx", passes="fold", precision=None, source_half_precision=None, contents=QUANTIZED_FLOAT64
    )
    assert [str(diagnostic) for diagnostic in pipeline.diagnostics] == [
        "`demote-float64` is added: the model contains float64, which tensorrt-rtx computes in float32",
        "`simulate-quantization` is added: the model is quantized, and tensorrt-rtx computes int8 without zero points only",
    ]
