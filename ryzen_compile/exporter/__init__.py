"""Export: from a PyTorch module to an ONNX file that was compared with it before it was kept."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ryzen_compile.errors import RyzenError, UsageError
from ryzen_compile.exporter.dynamic_shapes import DynamicAxes, parse_dynamic
from ryzen_compile.exporter.export_spec import complete_interface, make_export_spec
from ryzen_compile.exporter.strategies import export_graph
from ryzen_compile.exporter.validation import Deviation, compare_with_module, comparison_inputs
from ryzen_compile.ir.interface_metadata import write_interface
from ryzen_compile.ir.save import save
from ryzen_compile.progress import Progress, SilentProgress
from ryzen_compile.torch_module import make_runner
from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    from ryzen_compile.spec.recipe import Recipe

__all__ = ["Deviation", "ExportReport", "export", "parse_dynamic"]


class ExportReport(Record, frozen=True):
    """What was exported, how, and how close it is to its module."""

    name: str
    path: str
    strategy: str
    opset: int
    nodes: int
    size_bytes: int
    """Of the file and its external data together."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    cases: int
    """On how many feeds the graph was compared with the module."""
    deviations: tuple[Deviation, ...]
    notes: tuple[str, ...]
    """The strategies that failed, each with its reason, and what the winner left to say."""
    seconds: float


def export(
    model: str | Recipe | tuple[Any, Any],
    path: str | Path,
    *,
    opset: int | None = None,
    dynamic: DynamicAxes | None = None,
    max_abs: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> ExportReport:
    """Export a module to `path` as ONNX, if the graph does what the module does.

    `what` is a recipe or its name, a `file.py:callable`, or (module, inputs). A recipe says which dimensions are dynamic and
    how far the graph may be off; for other modules `dynamic` and `max_abs` do, and without the latter the bound is
    `agreement.UNITS`. Graph and module are compared on the samples and on synthetic feeds of several shapes. The interface
    goes into the file's metadata. Where anything fails nothing is left at `path`.

    Raises UsageError, RyzenError where torch cannot export or not at that opset, AccuracyError where the graph differs from
    its module.
    """
    started = time.perf_counter()
    target, progress = Path(path), progress or SilentProgress()
    if not target.parent.is_dir() or target.is_dir():
        raise UsageError(f"`{target}` is not a file in a folder that exists", hint=f"mkdir -p {target.parent}")
    with progress.stage("make the module"):
        subject = make_export_spec(model, dynamic or {}, seed=seed)
    with progress.stage(f"export {subject.name}"):
        exported = export_graph(subject.export_request(opset))
        if opset is not None and exported.opset != opset:
            raise RyzenError(
                f"torch writes `{subject.name}` at opset {exported.opset}, not at {opset}",
                hint=f"give --opset {exported.opset}, or leave it out",
            )
        interface = complete_interface(subject, exported.model)
        write_interface(exported.model, interface)
    with _staged_output(target) as draft:
        with progress.stage(f"write {target.name}"):
            save(exported.model, draft)
        with progress.stage("compare with the module"):
            cases, deviations = compare_with_module(
                draft,
                make_runner(subject.module, interface),
                comparison_inputs(subject.samples, interface, seed=seed),
                interface,
                max_abs=subject.max_abs if max_abs is None else max_abs,
            )
        size = sum(file.stat().st_size for file in draft.parent.iterdir())
    return ExportReport(
        name=subject.name,
        path=str(target),
        strategy=exported.strategy,
        opset=exported.opset,
        nodes=sum(1 for _ in exported.model.graph.all_nodes()),
        size_bytes=size,
        inputs=tuple(map(str, interface.inputs)),
        outputs=tuple(map(str, interface.outputs)),
        cases=cases,
        deviations=deviations,
        notes=exported.notes,
        seconds=round(time.perf_counter() - started, 3),
    )


@contextlib.contextmanager
def _staged_output(target: Path) -> Iterator[Path]:
    """Offer a path in a hidden folder beside `target`; when the block ends, what lies there takes its place, weights first."""
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name[:100]}.") as folder:
            draft = Path(folder) / target.name
            yield draft
            for file in sorted(Path(folder).iterdir(), key=lambda file: file == draft):
                os.replace(file, target.parent / file.name)
    except OSError as error:
        raise RyzenError(f"`{target}` cannot be written: {error.strerror or error}") from error
