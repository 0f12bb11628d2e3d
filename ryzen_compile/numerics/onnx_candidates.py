"""ONNX files as subjects: by ONNX Runtime, and rounded after every op where they compute in half precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ryzen_compile import registry
from ryzen_compile.numerics.candidate import Open, Run, Subject, as_float_type
from ryzen_compile.numerics.criteria import Precision

if TYPE_CHECKING:
    import onnx_ir as ir

    from ryzen_compile.spec.passes import Feed


def of_onnx(path: Path) -> Subject:
    """Return an ONNX file as a subject: by ONNX Runtime, and rounded after every op where it computes in half precision."""
    from ryzen_compile.ir.interface_metadata import interface_of
    from ryzen_compile.ir.load import load

    model = load(path)
    precision = precision_of(model)
    return Subject(
        name=str(path),
        executed=spell_graph(path.name, precision),
        interface=interface_of(model),
        open=open_graph(path, precision),
        precision=precision,
        portable=precision == "fp32",
    )


def precision_of(model: ir.Model) -> Precision:
    """Return the coarsest floating-point type that `model` holds anywhere."""
    import onnx_ir as ir

    from ryzen_compile.ir.analysis.element_types import element_types

    held = {*element_types(model).values(), *(value.dtype for value in model.graph.initializers.values())}
    return "bf16" if ir.DataType.BFLOAT16 in held else "fp16" if ir.DataType.FLOAT16 in held else "fp32"


def spell_graph(name: str, precision: Precision) -> str:
    """Return what is really executed when a graph runs here."""
    version = registry.find_backend("onnxruntime").probe().version
    runtime = f"by ONNX Runtime {version}"
    return f"{name}, {runtime}" if precision == "fp32" else f"{name}, {precision}, rounded after every op, {runtime}"


def open_graph(path: Path, precision: Precision) -> Open:
    """Return how to run the graph at `path`.

    ONNX Runtime computes half precision in fp32 on a CPU, which hides overflow: such a graph is rewritten to round after
    every op, and that is what runs.
    """

    @contextmanager
    def opened() -> Iterator[Run]:
        backend = registry.find_backend("onnxruntime")
        if precision == "fp32":
            with backend.open(str(path)) as session:
                yield feeding(session)
            return
        from tempfile import TemporaryDirectory

        from ryzen_compile.ir.load import load
        from ryzen_compile.ir.save import save
        from ryzen_compile.numerics.rounding import rounded

        with TemporaryDirectory(prefix="ryzen-compile-") as folder:
            file = Path(folder, "rounded.onnx")
            save(rounded(load(path)), file, weights="external")
            with backend.open(str(file)) as session:
                yield feeding(session)

    return opened


def feeding(session: Any) -> Run:
    """Return the session's `run`, which converts between floating-point types where the feed has others."""
    dtypes = {spec.name: spec.dtype for spec in session.inputs}

    def run(feed: Feed) -> Feed:
        outputs: Feed = session.run({name: as_float_type(array, dtypes.get(name)) for name, array in feed.items()})
        return outputs

    return run
