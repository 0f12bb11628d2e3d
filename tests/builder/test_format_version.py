"""Models in a newer version of the file format than ONNX Runtime reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

import ryzen_compile as rc
from ryzen_compile.backends.onnxruntime.backend import BACKEND
from ryzen_compile.ir.load import MAX_IR_VERSION


def write(path: Path, ir_version: int) -> str:
    """Write y = x W with W in a file beside it."""
    model = onnx.parser.parse_model(
        f'<ir_version: {ir_version}, opset_import: ["" : 20]> g (float[n,8] x) => (float[n,4] y) {{ y = MatMul (x, w) }}'
    )
    weights = np.arange(32, dtype=np.float32).reshape(8, 4)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    onnx.save(model, path, save_as_external_data=True, location=f"{path.stem}.data", size_threshold=0)
    return str(path)


def test_a_variant_has_the_version_of_its_source_or_the_newest_that_runs(tmp_path: Path) -> None:
    """Builds of equal graphs in other versions, with one cache, do not share variants."""
    for version in (MAX_IR_VERSION + 1, 8, MAX_IR_VERSION + 1):
        package = rc.build(write(tmp_path / "m.onnx", version), gpu="cpu", cache=tmp_path / "cache")
        graph = onnx.load(package.path / package.manifest.graphs[0].variants[0].path, load_external_data=False)
        assert graph.ir_version == min(version, MAX_IR_VERSION)


def test_a_graph_of_a_newer_version_runs_as_it_is(tmp_path: Path) -> None:
    with BACKEND.open(write(tmp_path / "m.onnx", MAX_IR_VERSION + 1)) as session:
        y = session.run({"x": np.ones((2, 8), np.float32)})["y"]
    np.testing.assert_array_equal(y, np.full((2, 8), 1.0) @ np.arange(32).reshape(8, 4))
