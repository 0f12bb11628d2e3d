"""ONNX Runtime sessions of models in memory or in files, on the CPU with one thread and without log messages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

Array = np.ndarray[Any, Any]


def open_session(model: ir.Model | onnx.ModelProto | Path, *, optimizations: str = "ORT_ENABLE_ALL") -> ort.InferenceSession:
    """Open a session; `optimizations` is the name of an optimization level of ONNX Runtime."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, optimizations)
    if isinstance(model, ir.Model):
        model = ir.to_proto(model)
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run_model(
    model: ir.Model | onnx.ModelProto | Path, inputs: Mapping[str, Array], *, optimizations: str = "ORT_ENABLE_ALL"
) -> list[Array]:
    """Return the outputs of a model, in order."""
    outputs: list[Array] = open_session(model, optimizations=optimizations).run(None, dict(inputs))
    return outputs


def run_as_written(model: ir.Model | onnx.ModelProto | Path, inputs: Mapping[str, Array]) -> list[Array]:
    """Return the outputs of a model without graph optimizations, in order."""
    return run_model(model, inputs, optimizations="ORT_DISABLE_ALL")
