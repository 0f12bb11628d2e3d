"""Export of PyTorch modules to ONNX. A file is written only if its outputs match those of the module."""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from ryzen_compile.data.size_search import SizeLimit, with_limits
from ryzen_compile.errors import AccuracyError, RyzenError, UsageError
from ryzen_compile.exporter.dynamic_shapes import DynamicAxes, SizeRange, parse_dynamic
from ryzen_compile.exporter.export_spec import ExportSpec, complete_interface, make_export_spec
from ryzen_compile.exporter.strategies import ExportedGraph, export_graph
from ryzen_compile.exporter.validation import (
    CaseError,
    Deviation,
    compare_with_module,
    comparison_inputs,
    control_inputs,
    find_size_limits,
    sizes_hint,
)
from ryzen_compile.ir.interface_metadata import write_interface
from ryzen_compile.ir.output_path import check_output
from ryzen_compile.ir.save import save
from ryzen_compile.ir.text_files import text_folder_name, write_text_files
from ryzen_compile.processes.limits import ResourceLimits
from ryzen_compile.progress import Progress, SilentProgress, StageItems
from ryzen_compile.spec.interface import Inputs, Interface, Outputs
from ryzen_compile.spec.profile import default_sizes
from ryzen_compile.spec.recipe import Recipe
from ryzen_compile.torch_module import find_source, make_run_function, suppress_output
from ryzen_compile.utils.mapped_pages import release_mapped_pages
from ryzen_compile.utils.record import Record
from ryzen_compile.utils.summarized import Summarized
from ryzen_compile.utils.user_script import split_script_reference

if TYPE_CHECKING:
    import onnx_ir as ir

_MAX_INLINE_BYTES = 1 << 28
"""The size of weights above which they are external data, which runtimes map: weights in the ONNX file are read to memory."""

_NO_TOKENIZER_NOTE = "the model has no tokenizer (tokenizer.json), so its package takes ids, and no text"

__all__ = ["Deviation", "ExportReport", "export", "parse_dynamic"]

RETRY_OPSET = 18
"""The opset that is tried if the graph at a newer one fails: the opset in which torch writes every op as older ones."""


class ExportReport(Summarized, Record, frozen=True):
    """The result of an export: the file, the strategy, and the deviations from the module."""

    name: str
    path: str
    strategy: str
    """`torch.export`, `torch.export, strict` or `the tracer`."""
    opset: int
    nodes: int
    """The number of nodes, including those of subgraphs."""
    size_bytes: int
    """The size of the file and its external data."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sizes: dict[str, str]
    """The range of sizes of each dynamic dimension by name: `400..16000`, or `1..` without a largest size."""
    cases: int
    """The number of inputs on which the graph was compared with the module."""
    deviations: tuple[Deviation, ...]
    notes: tuple[str, ...]
    """The opset and the strategies that failed, each with the reason, the warnings of the strategy that succeeded, and the
    sizes that the module does not accept."""
    seconds: float

    @property
    def summary(self) -> str:
        """The file, and how much it deviates from the module."""
        worst = max(self.deviations, key=lambda deviation: deviation.bound_fraction)
        return (
            f"{self.path}: {self.nodes} nodes, opset {self.opset}, {self.cases} cases, "
            f"`{worst.output}` within {worst.max_abs:.3g} (at most {worst.bound:.3g})"
        )

    def _details(self) -> list[str]:
        return [*(f"input {spec}" for spec in self.inputs), *(f"output {spec}" for spec in self.outputs), *self.notes]


def export(
    model: str | Recipe | tuple[Any, Any],
    path: str | os.PathLike[str] | None = None,
    *,
    opset: int | None = None,
    dynamic: DynamicAxes | None = None,
    max_abs: float | None = None,
    seed: int = 0,
    limits: ResourceLimits | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Export a module to `path` as ONNX (default: the name of the model in the current folder) and compare the two.

    `model` is a recipe, `NAME` or `recipe:NAME`, `hf:FOLDER`, a `file.py:callable`, or a pair (module, inputs). A recipe
    declares its dynamic dimensions, and may declare the accepted deviation and a tokenizer, whose files are written next to
    `path`. For other modules `dynamic` gives the dynamic dimensions and `max_abs` the maximum absolute deviation, by default
    that of `validation.TOLERANCES`. The sizes that the module accepts are found by running it and recorded, within the ranges
    of `dynamic`. Graph and module are compared on the samples and on synthetic inputs of several shapes. If the graph fails or
    differs at the default opset, `RETRY_OPSET` is tried. The interface is recorded in the metadata of the file. If any step
    fails, `path` is not changed. The graph runs in a child process within `limits`.

    Raises:
        UsageError: `model`, `path` or `dynamic` is invalid.
        RyzenError: torch cannot export the module, or not at `opset`, or the file cannot be written.
        AccuracyError: The outputs of the graph differ from those of the module.
    """
    started = time.perf_counter()
    progress = progress or SilentProgress()
    if path is not None:
        _check_output_path(Path(path))
    with progress.stage("create the module"):
        with suppress_output():
            source = find_source(model)
        output_path = Path(path) if path is not None else _default_path(source)
        _check_output_path(output_path)
        export_spec = make_export_spec(source, dynamic or {}, seed=seed)
    bound = export_spec.max_abs if max_abs is None else max_abs
    exported, interface = _export_graph(export_spec, opset, progress)
    size_limits = _find_limits(export_spec, interface, seed, progress)

    def write_compared(exported: ExportedGraph, interface: Interface) -> ExportReport:
        limited = with_limits(interface, size_limits)
        return _write_compared(export_spec, output_path, exported, limited, bound, seed, limits, progress)

    def hint_of(error: AccuracyError) -> str | None:
        """Return the hint of an error of `exported`: the sizes at which it agrees with the module, otherwise its own."""
        if not isinstance(error, CaseError) or error.agreeing_inputs is None:
            return error.hint
        limited = with_limits(interface, size_limits)
        module = make_run_function(export_spec.module, limited)
        with progress.stage("find the sizes at which graph and module agree"), _hidden_folder(output_path) as folder:
            graph = folder / output_path.name
            save(exported.model, graph, weights=_weight_location(exported.model), check=False)
            return sizes_hint(graph, module, error.agreeing_inputs, limited, max_abs=bound, limits=limits) or error.hint

    try:
        report = write_compared(exported, interface)
    except AccuracyError as error:
        if opset is not None or exported.opset <= RETRY_OPSET:
            other_opset = "omit --opset, so that another opset is tried" if opset and opset > RETRY_OPSET else None
            raise AccuracyError(error.message, hint=hint_of(error) or other_opset) from error
        try:
            report = write_compared(*_export_graph(export_spec, RETRY_OPSET, progress))
        except RyzenError as retry_error:
            hint = "; ".join(filter(None, (hint_of(error), f"opset {RETRY_OPSET} fails too")))
            raise AccuracyError(error.message, hint=hint) from retry_error
        reason = f"opset {exported.opset} failed, so opset {RETRY_OPSET} was used: {error.message}"
        report = msgspec.structs.replace(report, notes=(reason, *report.notes))
    notes = (*report.notes, *map(str, size_limits), *_shared_size_notes(size_limits, export_spec))
    return msgspec.structs.replace(report, notes=notes, seconds=round(time.perf_counter() - started, 3))


def _shared_size_notes(limits: Sequence[SizeLimit], export_spec: ExportSpec) -> list[str]:
    """Return a note for each limited dim whose size in the samples is the fixed size of the first axis of another input."""
    typical = export_spec.interface.typical_sizes
    return [
        f"axis 0 of `{spec.name}` is always {size}, the size of `{dim}` in the samples: to make both dynamic, "
        f"add --dynamic {spec.name}:0={dim}"
        for dim, size in typical.items()
        for spec in export_spec.interface.inputs
        if spec.dims and spec.dims[0] == size and any(limit.dim == dim for limit in limits)
    ]


def _export_graph(export_spec: ExportSpec, opset: int | None, progress: Progress) -> tuple[ExportedGraph, Interface]:
    """Return the graph at `opset` (None: that of `export_spec`) and its interface."""
    with progress.stage(f"export {export_spec.name}" + (f" at opset {opset}" if opset else "")):
        exported = export_graph(export_spec.export_request(opset))
    if opset is not None and exported.opset != opset:
        raise RyzenError(
            f"torch exports `{export_spec.name}` at opset {exported.opset}, not at the requested opset {opset}",
            hint=f"use --opset {exported.opset}, or omit --opset",
        )
    return exported, complete_interface(export_spec, exported.model)


def _find_limits(export_spec: ExportSpec, interface: Interface, seed: int, progress: Progress) -> tuple[SizeLimit, ...]:
    """Return the limits of the sizes that the module accepts; empty if a recipe declares the interface."""
    if export_spec.interface_declared:
        return ()
    with progress.stage("find the sizes that the module accepts", StageItems("runs")) as stage:
        run_module = make_run_function(export_spec.module, interface)

        def run(inputs: Inputs) -> Outputs:
            try:
                return run_module(inputs)
            finally:
                stage.advance()

        return find_size_limits(interface, export_spec.example_inputs, run, seed=seed)


def _write_compared(
    export_spec: ExportSpec,
    output_path: Path,
    exported: ExportedGraph,
    interface: Interface,
    max_abs: float | None,
    seed: int,
    limits: ResourceLimits | None,
    progress: Progress,
) -> ExportReport:
    """Compare a graph with its module, write it, and return the report, with a duration of 0."""
    write_interface(exported.model, interface)
    with _staged_output(output_path) as staged_path:
        with progress.stage(f"write {output_path.name}"):
            if export_spec.text_files:
                folder = text_folder_name(output_path)
                write_text_files(exported.model, staged_path, export_spec.text_files, folder=folder)
            save(exported.model, staged_path, weights=_weight_location(exported.model))
        with progress.stage("compare with the module"):
            module = make_run_function(export_spec.module, interface)
            # The graph runs before the module does, so that only one of them has its weights in memory.
            release_mapped_pages(tensor.data_ptr() for tensor in export_spec.module.state_dict().values())
            cases, deviations = compare_with_module(
                staged_path,
                module,
                itertools.chain(
                    comparison_inputs(export_spec.samples, interface, seed=seed),
                    control_inputs(exported.model, interface, export_spec.example_inputs, module),
                ),
                interface,
                max_abs=max_abs,
                limits=limits,
                progress=progress,
            )
        size = sum(file.stat().st_size for file in staged_path.parent.iterdir() if file.is_file())
    return ExportReport(
        name=export_spec.name,
        path=str(output_path),
        strategy=exported.strategy,
        opset=exported.opset,
        nodes=sum(1 for _ in exported.model.graph.all_nodes()),
        size_bytes=size,
        inputs=tuple(map(str, interface.inputs)),
        outputs=tuple(map(str, interface.outputs)),
        sizes=_size_ranges(interface),
        cases=cases,
        deviations=deviations,
        notes=(*exported.notes, *([_NO_TOKENIZER_NOTE] if export_spec.lacks_tokenizer else [])),
        seconds=0,
    )


def _size_ranges(interface: Interface) -> dict[str, str]:
    """Return the range of each named dim, `1..` if the model has no limit."""
    return {dim: str(SizeRange(low, interface.max_sizes.get(dim))) for dim, low in default_sizes(interface)[0].items()}


def _check_output_path(path: Path) -> None:
    if path.is_dir():
        hint = f"give the path of a file, such as {path / 'model.onnx'}; for step graphs of a decoder, end it with `/`: {path}/"
        raise UsageError(f"`{path}` is a folder", hint=hint)
    if not path.parent.is_dir():
        raise UsageError(f"`{path}` must be the path of a file in an existing folder", hint=f"mkdir -p {path.parent}")
    check_output(path)


def _default_path(source: object) -> Path:
    """Return the path of the graph of `source`, a result of `find_source`, in the current folder."""
    if isinstance(source, str):
        return Path(f"{Path(split_script_reference(source)[0]).stem}.onnx")
    if isinstance(source, Recipe):
        return Path(f"{source.name}.onnx")
    raise UsageError(
        f"a {type(source).__name__} has no name to derive the output path from", hint="give the path of the ONNX file"
    )


def _weight_location(model: ir.Model) -> Literal["inline", "external"]:
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    return "external" if size > _MAX_INLINE_BYTES else "inline"


@contextlib.contextmanager
def _staged_output(output_path: Path) -> Iterator[Path]:
    """Yield a path in a hidden folder next to `output_path`; at the end of the block, move its files there, the graph last."""
    with _hidden_folder(output_path) as folder:
        staged_path = folder / output_path.name
        yield staged_path
        files = [file for file in folder.rglob("*") if file.is_file()]
        for file in sorted(files, key=lambda file: file == staged_path):
            target = output_path.parent / file.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            os.replace(file, target)


@contextlib.contextmanager
def _hidden_folder(output_path: Path) -> Iterator[Path]:
    """Yield a hidden folder next to `output_path`, which is deleted at the end of the block."""
    try:
        with tempfile.TemporaryDirectory(dir=output_path.parent, prefix=f".{output_path.name[:100]}.") as folder:
            yield Path(folder)
    except OSError as error:
        raise RyzenError(
            f"`{output_path}` cannot be written: {error.strerror or error}", hint="choose a folder with write permission"
        ) from error
