"""Statistics of a model that a calibrated score takes, in a file that says what they were fitted to."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ryzen_compile.errors import ModelError
from ryzen_compile.utils.atomic_file import write_atomic
from ryzen_compile.utils.record import Record

Array = np.ndarray[Any, Any]
_METADATA_KEY = "ryzen_compile.statistics"
_WEIGHT_OPS = frozenset({"MatMul", "Gemm", "Gather"})
_MIN_ELEMENTS = 1024


class StatisticsHeader(Record, frozen=True):
    """What a file of statistics says of itself."""

    score: str
    """The score that they are for."""
    model_fingerprint: str
    """The fingerprint of the weights of the model."""
    layers: int
    tokens: int
    """To how many tokens they were fitted."""
    recent_window: int
    """How far behind a token the queries were whose attention counts."""


class Statistics:
    """Arrays by layer and word."""

    def __init__(self, header: StatisticsHeader, tensors: Mapping[str, Array]) -> None:
        self.header = header
        self.tensors = dict(tensors)

    def tensor(self, layer: int, name: str) -> Array:
        """Return the array called `word` of a layer."""
        return self.tensors[f"{layer}.{name}"]

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write them to `path`, whole or not at all."""
        data = save(
            {name: np.ascontiguousarray(array) for name, array in sorted(self.tensors.items())},
            metadata={_METADATA_KEY: msgspec.json.encode(self.header).decode()},
        )
        write_atomic(Path(path), data)


def read_statistics(path: str | os.PathLike[str]) -> Statistics:
    """Return the statistics in the file at `path`; raises ModelError where there are none."""
    try:
        with safe_open(os.fspath(path), "numpy") as file:
            told, names = (
                msgspec.json.decode((file.metadata() or {}).get(_METADATA_KEY, ""), type=StatisticsHeader),
                file.keys(),
            )
            return Statistics(told, {name: file.get_tensor(name) for name in names})
    except (OSError, SafetensorError, msgspec.DecodeError) as error:
        raise ModelError(f"`{os.fspath(path)}` holds no statistics: {error}", hint="write them with `calibrate`") from None


def fingerprint(model: ir.Model) -> str:
    """Return a digest of the weights of the products and tables of `model`, whatever they are called, in whatever order."""
    weights = {
        value
        for node in model.graph
        if node.op_type in _WEIGHT_OPS
        for value in node.inputs
        if value is not None and value.const_value is not None and value.const_value.size >= _MIN_ELEMENTS
    }
    digests = sorted(hashlib.sha256(value.const_value.tobytes()).digest() for value in weights if value.const_value is not None)
    return hashlib.sha256(b"".join(digests)).hexdigest()[:32]
