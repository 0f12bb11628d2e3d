"""Small ONNX graphs, profiles and build requests for the tests of the backends."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from ryzen_compile.backends.api import BuildRequest
from ryzen_compile.spec.profile import Profile
from ryzen_compile.spec.target import parse_targets

ADD = """
<ir_version: 10, opset_import: ["" : 21]>
add (float[N,4] x) => (float[N,4] y) { [double] h = Add (x, x)  [rectify] y = Relu (h) }
"""
CRASHES_THE_PARSER = """
<ir_version: 10, opset_import: ["" : 21, "any" : 1]>
crash (float[1,4] x) => (float[1,4] y) { [fine] h = Relu (x)
  [poison] y = any.MyelinWeightsTransformPlugin <plugin_version = "1", plugin_namespace = ""> (h) }
"""
"""TensorRT-RTX 1.7 ships a plugin of this name, and its parser crashes with a segmentation fault when it creates one."""


def save_graph(text: str, path: Path) -> str:
    """Write the model in ONNX text syntax to `path` and return the path."""
    onnx.save(onnx.parser.parse_model(text), path)
    return str(path)


def attention_text(queries: str, element: str = "float16", size: int = 64) -> str:
    """Return a model of one Attention node in ONNX text syntax; `queries` is the query length, a size or a dim name."""
    query, key_value = f"{element}[B,8,{queries},{size}]", f"{element}[B,8,S,{size}]"
    return f"""
<ir_version: 10, opset_import: ["" : 23]>
attend ({query} q, {key_value} k, {key_value} v) => ({query} y) {{ [attend] y = Attention (q, k, v) }}
"""


def save_with_external_weight(path: Path) -> str:
    """Write a model of one MatMul to `path`, with its weight in the external file `<name>.data` in the same folder."""
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[N,64] x) => (float[N,64] y) { y = MatMul (x, w) }'
    )
    weight = onnx.numpy_helper.from_array(np.eye(64, dtype=np.float32), "w")
    model.graph.initializer.append(weight)
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0)
    return str(path)


def profile(**inputs: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]) -> Profile:
    """Return a profile, given the (min, opt, max) shapes of each input."""
    low, opt, high = ({name: shapes[index] for name, shapes in inputs.items()} for index in range(3))
    return Profile(min=low, opt=opt, max=high)


ROWS_PROFILE = profile(x=((1, 4), (2, 4), (8, 4)))


def build_request(
    onnx_path: str, output: Path, *, gpu: str = "sm89", profiles: tuple[Profile, ...] = (ROWS_PROFILE,), **fields: object
) -> BuildRequest:
    """Return a build request for the targets `gpu`, with further `fields` of `BuildRequest`."""
    return BuildRequest(onnx_path=onnx_path, output=str(output), targets=parse_targets(gpu), profiles=profiles, **fields)  # type: ignore[arg-type]
