"""ONNX files as candidates: run by ONNX Runtime; graphs in half precision are rounded after every op."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ryzen_compile import registry
from ryzen_compile.backends.onnxruntime.backend import OnnxRuntime
from ryzen_compile.backends.traits import find_traits, portable_backend
from ryzen_compile.errors import ModelError
from ryzen_compile.numerics.candidate import Candidate, OpenFunction, as_float_type
from ryzen_compile.numerics.unspecified_rows import with_specified_rows
from ryzen_compile.spec.dtypes import Precision

if TYPE_CHECKING:
    import onnx_ir as ir

    from ryzen_compile.spec.interface import Inputs, Outputs, RunFunction


_MIN_MAPPED_BYTES = 256_000_000
"""The size of weights from which a candidate maps them: to copy them into the layout of ONNX Runtime takes longer than the few
cases of a comparison gain by it."""


def onnx_candidate(path: Path) -> Candidate:
    """Return an ONNX file as a candidate, run by ONNX Runtime and rounded after every op if it computes in half precision."""
    from ryzen_compile.ir.interface_metadata import interface_of
    from ryzen_compile.ir.load import load

    model = load(path)
    precision = graph_precision(model)
    return Candidate(
        name=str(path),
        description=describe_graph(path.name, precision),
        interface=interface_of(model),
        open=open_graph(path, precision),
        precision=precision,
        can_be_baseline=precision == "fp32",
        model_file=path,
    )


def graph_precision(model: ir.Model) -> Precision:
    """Return the coarsest floating-point type of any tensor of `model`."""
    import onnx_ir as ir

    from ryzen_compile.ir.analysis.element_types import element_types

    dtypes = {*element_types(model).values(), *(value.dtype for value in model.graph.initializers.values())}
    return "bf16" if ir.DataType.BFLOAT16 in dtypes else "fp16" if ir.DataType.FLOAT16 in dtypes else "fp32"


def describe_graph(name: str, precision: Precision) -> str:
    """Return a description of what is executed when the graph `name` runs on this machine."""
    version = registry.find_backend(portable_backend()).probe().version
    runtime = f"by ONNX Runtime {version}"
    return f"{name}, {precision}, rounded after every op, {runtime}" if _is_emulated(precision) else f"{name}, {runtime}"


def _is_emulated(precision: Precision) -> bool:
    """Return whether a graph of `precision` runs in fp32 with rounding after every op."""
    return precision != "fp32" and not find_traits(portable_backend()).computes_half_precision


def _weight_bytes(path: Path) -> int:
    """Return the size of the files of external weights of the graph at `path`; 0 if it cannot be read."""
    from ryzen_compile.ir import protobuf_scan
    from ryzen_compile.ir.weight_files import resolve_model_file

    try:
        tensors = protobuf_scan.read_skeleton(resolve_model_file(path)).tensor_locations
        locations = {tensor.location for tensor in tensors if tensor.location is not None}
        return sum(Path(path.parent, location).stat().st_size for location in locations)
    except (ModelError, OSError):
        return 0  # ONNX Runtime reports what is wrong with the file


def open_graph(path: Path, precision: Precision) -> OpenFunction:
    """Return how to open the graph at `path`.

    On a CPU ONNX Runtime computes half precision in fp32, which hides overflow. A graph in half precision is therefore
    rewritten to fp32 with rounding after every op, and the rewritten graph runs. Unspecified rows of caches are 0.
    """

    @contextmanager
    def open_session() -> Iterator[RunFunction]:
        backend = OnnxRuntime(low_memory=True, map_weights=_weight_bytes(path) >= _MIN_MAPPED_BYTES)
        if not _is_emulated(precision):
            with backend.open(str(path)) as session, with_specified_rows(path, as_run_function(session)) as run:
                yield run
            return
        from tempfile import TemporaryDirectory

        from ryzen_compile.ir.load import load
        from ryzen_compile.ir.save import save
        from ryzen_compile.numerics.half_emulation import emulate_half_precision

        with TemporaryDirectory(prefix="ryzen-compile-") as folder:
            file = Path(folder, "rounded.onnx")
            save(emulate_half_precision(load(path)), file, weights="external")
            with backend.open(str(file)) as session, with_specified_rows(path, as_run_function(session)) as run:
                yield run

    return open_session


def as_run_function(session: Any) -> RunFunction:
    """Return the session's `run` with a cast of each floating-point input to the type that the session expects."""
    dtypes = {spec.name: spec.dtype for spec in session.inputs}

    def run(inputs: Inputs) -> Outputs:
        outputs: Outputs = session.run({name: as_float_type(array, dtypes.get(name)) for name, array in inputs.items()})
        return outputs

    return run
