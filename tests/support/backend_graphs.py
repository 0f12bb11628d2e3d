"""Small graphs to build."""

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
"""TensorRT-RTX 1.7 ships a plugin of this name, and its parser dies of a segmentation fault when it makes one."""


def save_graph(text: str, path: Path) -> str:
    """Write the graph `text` to `path`."""
    onnx.save(onnx.parser.parse_model(text), path)
    return str(path)


def attention_text(queries: str, element: str = "float16", size: int = 64) -> str:
    """Return the text of one attention over `queries` queries, one of a size or a letter."""
    query, other = f"{element}[B,8,{queries},{size}]", f"{element}[B,8,S,{size}]"
    return f"""
<ir_version: 10, opset_import: ["" : 23]>
attend ({query} q, {other} k, {other} v) => ({query} y) {{ [attend] y = Attention (q, k, v) }}
"""


def save_with_external_weight(path: Path) -> str:
    """Write a MatMul whose weight lies in a file beside it."""
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[N,64] x) => (float[N,64] y) { y = MatMul (x, w) }'
    )
    weight = onnx.numpy_helper.from_array(np.eye(64, dtype=np.float32), "w")
    model.graph.initializer.append(weight)
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0)
    return str(path)


def profile(**inputs: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]) -> Profile:
    """Return a profile of (min, opt, max) for each input."""
    low, opt, high = ({name: shapes[at] for name, shapes in inputs.items()} for at in range(3))
    return Profile(min=low, opt=opt, max=high)


ROWS_PROFILE = profile(x=((1, 4), (2, 4), (8, 4)))


def build_request(
    graph: str, output: Path, *, gpu: str = "sm89", profiles: tuple[Profile, ...] = (ROWS_PROFILE,), **more: object
) -> BuildRequest:
    """Return a request for the targets `gpu`."""
    return BuildRequest(onnx_path=graph, output=str(output), targets=parse_targets(gpu), profiles=profiles, **more)  # type: ignore[arg-type]
