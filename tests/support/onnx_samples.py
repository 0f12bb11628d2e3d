"""Small ONNX models that together cover the features of the format, for tests that read and write files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

LINEAR = """
<ir_version: 10, opset_import: ["" : 21]>
linear (float[N, 64] x) => (float[N, 32] y) { [m] h = MatMul (x, w)  [a] y = Add (h, b) }
"""

OVERFLOW = """
<ir_version: 10, opset_import: ["" : 21]>
overflow (float[N] x) => (float[N] y) <float[1] thousand = {1000.0}> {
  [square] h = Mul (x, x)
  [scale] y = Div (h, thousand)
}
"""
"""300 becomes 90 in fp32; in fp16 its square is infinite, because the largest value of fp16 is 65,504."""

BRANCHES = """
<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
branches (bool c, float[N, 8] x) => (float[N, 8] y, float z) {
   one = Constant <value = float {1.0}> ()
   two = local.Twice (x)
   y = If (c) <
      then_branch = yes () => (float[N, 8] yes_out) { inner = Add (two, one)  yes_out = Identity (inner) },
      else_branch = no () => (float[N, 8] no_out) { no_out = Mul (x, one) }
   >
   z = ReduceSum <keepdims = 0> (y)
}
<domain: "local", opset_import: ["" : 21]>
Twice (a) => (b) { b = Add (a, a) }
"""

IR_VERSION_3 = """
<ir_version: 3, opset_import: ["" : 11]>
old (float[2] x, float[2] w) => (float[2] y) <float[2] w = {1.0, 2.0}> { y = Add (x, w) }
"""

STRINGS_AND_SEQUENCES = """
<ir_version: 10, opset_import: ["" : 21]>
words (string[N] s, seq(float[M]) q, optional(float[2]) o) => (string[N] t, float[M] f, bool h) <string[1] tail = {"!"}> {
   t = StringConcat (s, tail)
   zero = Constant <value = int64 {0}> ()
   f = SequenceAt (q, zero)
   h = OptionalHasElement (o)
}
"""


def linear_weights(seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Return the weights of LINEAR: `w` of 8 KiB and `b` of 128 bytes."""
    random = np.random.default_rng(seed)
    return {"w": random.random((64, 32), np.float32), "b": random.random(32, np.float32)}


def model(text: str, weights: Mapping[str, np.ndarray[Any, Any]] | None = None) -> onnx.ModelProto:
    """Parse `text` and add `weights` as initializers with raw data."""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in (weights or {}).items())
    return proto


def linear() -> onnx.ModelProto:
    """Return LINEAR with inline weights."""
    return model(LINEAR, linear_weights())


def write(proto: onnx.ModelProto, path: Path) -> Path:
    """Write `proto` to `path` and return `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(proto.SerializeToString())
    return path


def write_external(path: Path, *, data: str = "data.bin", **changes: Mapping[str, object]) -> Path:
    """Write LINEAR with external weights, stored consecutively in the file `data` next to it, and return `path`.

    `changes` replaces entries of the external data of a weight, by weight name; None omits an entry.
    """
    proto, content = model(LINEAR), b""
    for name, value in linear_weights().items():
        entries: dict[str, object] = {"location": data, "offset": len(content), "length": value.nbytes}
        entries |= changes.get(name, {})
        tensor = helper.make_tensor(name, onnx.TensorProto.FLOAT, value.shape, value.tobytes(), raw=True)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, entry in entries.items():
            if entry is not None:
                tensor.external_data.add(key=key, value=str(entry))
        proto.graph.initializer.append(tensor)
        content += value.tobytes()
    write(proto, path)
    path.with_name(data).write_bytes(content)
    return path
