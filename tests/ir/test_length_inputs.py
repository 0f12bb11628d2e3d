"""Lengths of rows in graphs without a recorded interface: found by their use, and drawn within the axis that they count."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.recurrent_models import export_with_lengths

import ryzen_compile as rc
from ryzen_compile.data.synthetic import synthesize
from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.ir.load import load
from ryzen_compile.spec.interface import Interface

AXES = "axes1 = Constant <value_ints = [1]> ()  "
POSITIONS = (
    AXES
    + """size = Shape <start = 1, end = 2> (x)  end = Squeeze (size)  zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()  p = Range (zero, end, one)  """
)
MASKED = "m = Cast <to = 1> (b)  y = Mul (x, m)"
LENGTHS = "l = Unsqueeze (n, axes1)  "
HALVED = """two = Constant <value_ints = [2]> ()  ones = Constant <value_ints = [1]> ()
    plus = Add (n, ones)  h = Div (plus, two)  l = Unsqueeze (h, axes1)  """
SHORT = """
    axes1 = Constant <value_ints = [1]> ()  w = Constant <value = float[1, 1, 2] {1, 1}> ()  x3 = Unsqueeze (x, axes1)
    c = Conv <strides = [2]> (x3, w)  s = Squeeze (c, axes1)  size = Shape <start = 1, end = 2> (s)  end = Squeeze (size)
    zero = Constant <value_int = 0> ()  one = Constant <value_int = 1> ()  p = Range (zero, end, one)  """


def parse(inputs: str, body: str, output: str = "float[B, T] y") -> ir.Model:
    text = f'<ir_version: 10, opset_import: ["" : 21]> g ({inputs}) => ({output}) {{ {body} }}'
    return ir.from_proto(onnx.parser.parse_model(text))


def interface(inputs: str, body: str, output: str = "float[B, T] y") -> Interface:
    return interface_of(parse(inputs, body, output))


@pytest.mark.parametrize(
    ("inputs", "body", "expected"),
    [
        ("float[B, T] x, int64[B] n", POSITIONS + LENGTHS + "b = Less (p, l)  " + MASKED, "T"),
        ("float[B, T] x, int64[B, 1] n", POSITIONS + "b = Greater (n, p)  " + MASKED, "T"),
        ("float[?, ?] x, int64[?] n", POSITIONS + LENGTHS + "b = Less (p, l)  " + MASKED, "x_dim1"),
        ("float[T, B, 4] x, int32[B] n", "y = ReverseSequence <batch_axis = 1, time_axis = 0> (x, n)", "T"),
        ("float[B, T] x, int64[B] n", SHORT + HALVED + "b = Less (p, l)  m = Cast <to = 1> (b)  y = Mul (s, m)", "T"),
        ("float[B, T] x, int64[B] n", POSITIONS + LENGTHS + "b = Equal (p, l)  " + MASKED, None),
        ("float[B, T] x, int64[B, T] n", POSITIONS + "b = Less (p, n)  " + MASKED, None),
        ("float[B, T] x, int64[B] n", AXES + LENGTHS + "f = Cast <to = 1> (l)  y = Div (x, f)", None),
    ],
)  # fmt: skip
def test_integers_that_are_compared_with_the_positions_of_an_axis_are_lengths(
    inputs: str, body: str, expected: str | None
) -> None:
    spec = interface(inputs, body, "float[C, D] y" if "T, B" not in inputs else "float[T, B, 4] y").input("n")
    assert (spec.role, spec.length_dim) == (("lengths", expected) if expected else ("values", None))


def test_lengths_along_an_axis_of_fixed_size_end_at_it() -> None:
    positions = "p = Constant <value_ints = [0, 1, 2, 3, 4, 5]> ()  axes1 = Constant <value_ints = [1]> ()  "
    spec = interface("float[B, 6] x, int64[B] n", positions + LENGTHS + "b = Less (p, l)  " + MASKED, "float[B, 6] y").input(
        "n"
    )
    assert (spec.role, spec.low, spec.high) == ("values", 1, 6)


def test_lengths_along_an_axis_that_no_input_has_are_one() -> None:
    body = SHORT + LENGTHS + "b = Less (p, l)  m = Cast <to = 1> (b)  y = Mul (s, m)"
    spec = interface("float[B, T] x, int64[B] n", body, "float[B, D] y").input("n")
    assert (spec.role, spec.low, spec.high) == ("values", 1, 1)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_lengths_of_a_recurrent_model_are_drawn_within_the_time_axis(kind: str, tmp_path: Path) -> None:
    path = export_with_lengths(kind, tmp_path / "m.onnx")
    found = interface_of(load(path))
    assert (found.input("lengths").role, found.input("lengths").length_dim) == ("lengths", "time")
    inputs = synthesize(found, {"x": (3, 9, 8), "lengths": (3,)}, seed=0, rows="mixed")
    assert sorted(inputs["lengths"]) == [1, 5, 9]
    package = rc.build(path, gpu="cpu", cache=False)
    outputs = rc.load(package.path).run(x=np.ones((2, 5, 8), np.float32), lengths=np.array([5, 2]))
    assert outputs["y"].shape == (2, 5, 4)
