"""Rows of caches that an op leaves unspecified: they are set to 0 in the outputs that are compared."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    import onnx_ir as ir

    from ryzen_compile.spec.interface import Inputs, Outputs, RunFunction

_LENGTHS_OUTPUT = "ryzen_compile_lengths_{}"
"""The name of the lengths of an attention, by its index."""


class UnspecifiedRows(Record, frozen=True):
    """The cache outputs of one attention with rows that hold no token."""

    outputs: tuple[str, ...]
    window: int


def unspecified_rows(model_file: Path | None) -> tuple[UnspecifiedRows, ...]:
    """Return the caches of a model with unspecified rows; empty without a model."""
    if model_file is None:
        return ()
    status = model_file.stat()
    return _find_rows(model_file, status.st_size, status.st_mtime_ns)


def unspecified_note(model_file: Path | None) -> tuple[str, ...]:
    """Return a note that names the outputs whose unspecified rows are not compared; empty without such outputs."""
    names = [f"`{name}`" for rows in unspecified_rows(model_file) for name in rows.outputs]
    if not names:
        return ()
    listed = ", ".join(names) if len(names) < 4 else f"{names[0]} .. {names[-1]} ({len(names)} outputs)"
    return (f"rows of {listed} that hold no token are unspecified by GroupQueryAttention, and not compared",)


@contextmanager
def with_specified_rows(model_file: Path, run: RunFunction) -> Iterator[RunFunction]:
    """Yield `run`, which runs the model in `model_file`, with the unspecified rows of its outputs set to 0."""
    caches = unspecified_rows(model_file)
    if not caches:
        yield run
        return
    from ryzen_compile.backends.onnxruntime.backend import OnnxRuntime
    from ryzen_compile.ir.analysis.window_caches import held_rows
    from ryzen_compile.ir.load import load
    from ryzen_compile.ir.save import save

    with TemporaryDirectory(prefix="ryzen-compile-") as folder:
        file = Path(folder, "lengths.onnx")
        save(_lengths_graph(load(model_file)), file, weights="external")
        with OnnxRuntime(low_memory=True).open(str(file)) as session:
            names = [spec.name for spec in session.inputs]

            def run_specified(inputs: Inputs) -> Outputs:
                outputs = dict(run(inputs))
                lengths = session.run({name: inputs[name] for name in names})
                for index, rows in enumerate(caches):
                    tokens = lengths[_LENGTHS_OUTPUT.format(index)].reshape(-1) + 1
                    for name in rows.outputs:
                        capacity = outputs[name].shape[2]
                        held = held_rows(tokens, capacity=capacity, window=rows.window)
                        is_held = np.arange(capacity) < held[:, None]
                        outputs[name] = np.where(is_held[:, None, :, None], outputs[name], np.zeros((), outputs[name].dtype))
                return outputs

            yield run_specified


@functools.lru_cache(maxsize=64)
def _find_rows(model_file: Path, size_bytes: int, modified_ns: int) -> tuple[UnspecifiedRows, ...]:
    """Return the caches with unspecified rows of a file of this size and time; it is loaded once, if it may have some."""
    from ryzen_compile.ir.analysis.window_caches import WINDOW_ATTRIBUTE, find_window_caches
    from ryzen_compile.ir.load import load
    from ryzen_compile.ir.protobuf_scan import read_skeleton
    from ryzen_compile.ir.weight_files import resolve_model_file

    if WINDOW_ATTRIBUTE.encode() not in read_skeleton(resolve_model_file(model_file)).proto:
        return ()
    graph = load(model_file).graph
    return tuple(
        UnspecifiedRows(tuple(value.name or "" for value in caches.presents if value.is_graph_output()), caches.window)
        for caches in find_window_caches(graph)
    )


def _lengths_graph(model: ir.Model) -> ir.Model:
    """Return `model` with the lengths of its attentions with window caches as the only outputs, and no other nodes."""
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    from ryzen_compile.ir.analysis.window_caches import find_window_caches

    caches = find_window_caches(model.graph)
    model.graph.outputs.clear()
    for index, one in enumerate(caches):
        node = ir.node("Identity", [one.lengths], name=_LENGTHS_OUTPUT.format(index))
        node.outputs[0].name, node.outputs[0].dtype = _LENGTHS_OUTPUT.format(index), ir.DataType.INT32
        model.graph.append(node)
        model.graph.outputs.append(node.outputs[0])
    RemoveUnusedNodesPass()(model)
    return model
