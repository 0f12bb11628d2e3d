"""A small model to build: two dense layers in a file of a few kilobytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WIDTH = 16


def model(*, scale: float = 0.5, half: bool = False, seed: int = 0) -> onnx.ModelProto:
    """Return y = relu(x @ a * scale) @ b, x: (batch, 16), y: (batch, 16)."""
    rng = np.random.default_rng(seed)
    numpy_dtype = np.float16 if half else np.float32
    onnx_dtype = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    weights = [
        numpy_helper.from_array((rng.standard_normal((WIDTH, WIDTH)) / 4).astype(numpy_dtype), name) for name in ("a", "b")
    ]
    weights.append(numpy_helper.from_array(np.array(scale, numpy_dtype), "scale"))
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"], name="first"),
        helper.make_node("Mul", ["h", "scale"], ["hs"], name="scaled"),
        helper.make_node("Relu", ["hs"], ["r"], name="relu"),
        helper.make_node("Identity", ["r"], ["ri"], name="nothing"),
        helper.make_node("MatMul", ["ri", "b"], ["y"], name="second"),
    ]
    x, y = (helper.make_tensor_value_info(name, onnx_dtype, ["batch", WIDTH]) for name in ("x", "y"))
    graph = helper.make_graph(nodes, "small", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def write(path: Path, *, scale: float = 0.5, half: bool = False, seed: int = 0) -> Path:
    """Write the model to `path` and return `path`."""
    path.write_bytes(model(scale=scale, half=half, seed=seed).SerializeToString())
    return path


def expected(x: np.ndarray, *, scale: float = 0.5, seed: int = 0) -> np.ndarray:
    """Return the exact outputs of the model for `x`, (batch, 16), in float64."""
    weights = {
        tensor.name: numpy_helper.to_array(tensor).astype(np.float64)
        for tensor in model(scale=scale, seed=seed).graph.initializer
    }
    return np.maximum(x.astype(np.float64) @ weights["a"] * scale, 0) @ weights["b"]
