"""A graph pass of your own: found through an entry point, run in a build, and compared with the model before it.

    python examples/own_pass/run.py    # writes norm.onnx and norm.ryzen to the current folder

`my_passes` is an installed package here because its folder, with the metadata that pip would write, is on the import path.
"""

from __future__ import annotations

import sys
from pathlib import Path

import onnx

sys.path.insert(0, str(Path(__file__).parent))

import ryzen_compile as rc

MODEL = """
<ir_version: 10, opset_import: ["" : 21]>
norm (float[batch, 8] x) => (float[batch, 8] y) {
    two = Constant <value_float = 2.0> ()  square = Pow (x, two)
    axes = Constant <value_ints = [-1]> ()  mean = ReduceMean (square, axes)
    root = Sqrt (mean)  y = Div (x, root)
}
"""
onnx.save(onnx.parser.parse_model(MODEL), "norm.onnx")
package = rc.build("norm.onnx", gpu="cpu", passes=["fold,square-by-mul"])
(variant,) = package.manifest.graphs[0].variants
for record in variant.passes:
    print(f"{record.pass_spec}: {record.reason}")
assert all(accuracy.met for accuracy in variant.accuracy)
