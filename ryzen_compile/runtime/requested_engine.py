"""Loading of the engine that a request names, in the child process that performs the request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ryzen_compile.artifacts.package.reference import parse_load_request
from ryzen_compile.processes.operation import performing
from ryzen_compile.runtime.load import load

if TYPE_CHECKING:
    from ryzen_compile.progress import Progress
    from ryzen_compile.runtime.load import Engine


@contextmanager
def requested_engine(
    package: str, *, graph: str | None = None, variant: str | None, backend: str | None, progress: Progress
) -> Iterator[tuple[Engine, str]]:
    """Load a package, with #GRAPH and @VARIANT, or an ONNX file; yield the engine and the name of the file.

    What was chosen, and the criteria that it does not meet, is reported.
    """
    request = parse_load_request(package, graph=graph, variant=variant, backend=backend)
    with progress.stage("load the package"), performing(f"loading {request.path.name}"):
        engine = load(request.path, graph=request.graph, variant=request.variant, backend=request.backend)
    with engine:
        for diagnostic in engine.diagnostics:
            progress.report(diagnostic)
        yield engine, request.path.name
