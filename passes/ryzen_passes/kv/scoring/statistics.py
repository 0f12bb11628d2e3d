"""Statistics of a model that a pass reads, stored as safetensors with a header that identifies the model."""

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
from ryzen_compile.ir.weights import chunks
from ryzen_compile.utils.atomic_file import write_atomic
from ryzen_compile.utils.record import Record
from ryzen_compile.utils.statistics_file import METADATA_KEY

Array = np.ndarray[Any, Any]
_WEIGHT_OPS = frozenset({"MatMul", "Gemm", "Gather"})
_MIN_ELEMENTS = 1024


class StatisticsHeader(Record, frozen=True):
    """Header of a statistics file."""

    kind: str
    """What the statistics are: the name of a calibrated score, or `key-mean`."""
    model_fingerprint: str
    """`weights_digest` of the model."""
    layers: int
    tokens: int
    """Number of tokens in the fit."""
    recent_window: int
    """Minimum distance in tokens from a token to the queries whose attention counts; 0 if none counts."""


class Statistics:
    """Arrays by layer and name."""

    def __init__(self, header: StatisticsHeader, tensors: Mapping[str, Array]) -> None:
        self.header = header
        self.tensors = dict(tensors)

    def tensor(self, layer: int, name: str) -> Array:
        """Return the array `name` of layer index `layer`."""
        return self.tensors[f"{layer}.{name}"]

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the statistics to `path` atomically, in safetensors format."""
        data = save(
            {name: np.ascontiguousarray(array) for name, array in sorted(self.tensors.items())},
            metadata={METADATA_KEY: msgspec.json.encode(self.header).decode()},
        )
        write_atomic(Path(path), data)


def read_statistics(path: str | os.PathLike[str]) -> Statistics:
    """Return the statistics in the file at `path`; raises ModelError if it cannot be read or holds none."""
    try:
        with safe_open(os.fspath(path), "numpy") as file:
            header = msgspec.json.decode((file.metadata() or {}).get(METADATA_KEY, ""), type=StatisticsHeader)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Statistics(header, tensors)
    except (OSError, SafetensorError, msgspec.DecodeError) as error:
        raise ModelError(
            f"`{os.fspath(path)}` holds no statistics: {error}", hint="write them with `ryzen-compile calibrate`"
        ) from None


def weights_digest(model: ir.Model) -> str:
    """Return a digest of the large weights of MatMul, Gemm and Gather in `model`, independent of their names and order."""
    weights = {
        value
        for node in model.graph
        if node.op_type in _WEIGHT_OPS
        for value in node.inputs
        if value is not None and value.const_value is not None and value.const_value.size >= _MIN_ELEMENTS
    }
    digests = sorted(_content_digest(value.const_value) for value in weights if value.const_value is not None)
    return hashlib.sha256(b"".join(digests)).hexdigest()[:32]


def _content_digest(tensor: ir.TensorProtocol) -> bytes:
    """Return the sha256 of the bytes of `tensor`, which are read in chunks: an embedding may be the largest weight."""
    digest = hashlib.sha256()
    for chunk in chunks(tensor):
        digest.update(chunk)
    return digest.digest()
