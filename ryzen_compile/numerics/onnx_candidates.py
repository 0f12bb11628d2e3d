"""ONNX files as subjects: by ONNX Runtime, and rounded after every op where they compute in half precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ryzen_compile import registry
from ryzen_compile.numerics.candidate import Candidate, OpenFunction, RunFunction, as_float_type
from ryzen_compile.numerics.criteria import Precision

if TYPE_CHECKING:
    import onnx_ir as ir

    from ryzen_compile.spec.passes import Inputs


def onnx_candidate(path: Path) -> Candidate:
    """Return an ONNX file as a subject: by ONNX Runtime, and rounded after every op where it computes in half precision."""
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
        portable=precision == "fp32",
    )


def graph_precision(model: ir.Model) -> Precision:
    """Return the coarsest floating-point type that `model` holds anywhere."""
    import onnx_ir as ir

    from ryzen_compile.ir.analysis.element_types import element_types

    held = {*element_types(model).values(), *(value.dtype for value in model.graph.initializers.values())}
    return "bf16" if ir.DataType.BFLOAT16 in held else "fp16" if ir.DataType.FLOAT16 in held else "fp32"


def describe_graph(name: str, precision: Precision) -> str:
    """Return what is really executed when a graph runs here."""
    version = registry.find_backend("onnxruntime").probe().version
    runtime = f"by ONNX Runtime {version}"
    return f"{name}, {runtime}" if precision == "fp32" else f"{name}, {precision}, rounded after every op, {runtime}"


def open_graph(path: Path, precision: Precision) -> OpenFunction:
    """Return how to run the graph at `path`.

    ONNX Runtime computes half precision in fp32 on a CPU, which hides overflow: such a graph is rewritten to round after
    every op, and that is what runs.
    """

    @contextmanager
    def opened() -> Iterator[RunFunction]:
        backend = registry.find_backend("onnxruntime")
        if precision == "fp32":
            with backend.open(str(path)) as session:
                yield as_run_function(session)
            return
        from tempfile import TemporaryDirectory

        from ryzen_compile.ir.load import load
        from ryzen_compile.ir.save import save
        from ryzen_compile.numerics.half_emulation import emulate_half_precision

        with TemporaryDirectory(prefix="ryzen-compile-") as folder:
            file = Path(folder, "rounded.onnx")
            save(emulate_half_precision(load(path)), file, weights="external")
            with backend.open(str(file)) as session:
                yield as_run_function(session)

    return opened


def as_run_function(session: Any) -> RunFunction:
    """Return the session's `run`, which converts between floating-point types where the feed has others."""
    dtypes = {spec.name: spec.dtype for spec in session.inputs}

    def run(feed: Inputs) -> Inputs:
        outputs: Inputs = session.run({name: as_float_type(array, dtypes.get(name)) for name, array in feed.items()})
        return outputs

    return run
