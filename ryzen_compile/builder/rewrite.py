"""Rewrite: run passes on an ONNX file and write the resulting graphs, without building a package."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from ryzen_compile import registry
from ryzen_compile.artifacts.package import layout
from ryzen_compile.backends.traits import portable_backend
from ryzen_compile.builder.code_key import code_key
from ryzen_compile.builder.default_pipelines import order_and_validate, pipeline_for
from ryzen_compile.diagnostic import Diagnostic
from ryzen_compile.errors import InvalidGraphError, UsageError
from ryzen_compile.ir.output_path import check_output, check_output_folder
from ryzen_compile.pipeline import parser
from ryzen_compile.pipeline.pass_manager import find_invalid_pass, run_passes, satisfied_properties
from ryzen_compile.pipeline.pipeline_id import pass_fingerprint
from ryzen_compile.progress import Progress, SilentProgress
from ryzen_compile.spec.pass_abilities import StepWidthAdjustable
from ryzen_compile.spec.pass_record import PassRecord
from ryzen_compile.spec.passes import PassContext
from ryzen_compile.utils.record import Record
from ryzen_compile.utils.summarized import Summarized

if TYPE_CHECKING:
    import onnx_ir as ir

    from ryzen_compile.processes.limits import ResourceLimits
    from ryzen_compile.spec.interface import Interface
    from ryzen_compile.spec.passes import Pass

_ANY_WIDTH = "any"
"""The spelling of a step width that is not fixed."""
_TEXT_FOLDER = "text"
"""The folder with the tokenizer of step graphs, next to their weight store."""


@dataclass(frozen=True, kw_only=True)
class RewriteConfig:
    """The passes to run on a model, and what they depend on."""

    passes: str
    """As in `kv-static{capacity=4096},kv-evict{budget=25%}`."""
    backend: str = field(default_factory=portable_backend)
    """The backend that the result is intended for."""
    data: str | None = None
    """Calibration samples."""
    seed: int = 0


class RewriteResult(Summarized, Record, frozen=True):
    """A graph that was written, and its pass log."""

    path: str
    passes: tuple[PassRecord, ...]

    @property
    def summary(self) -> str:
        """The file, and what each pass did."""
        return f"{self.path}: " + ", ".join(f"{record.pass_spec} {record.outcome}" for record in self.passes)

    def _details(self) -> list[str]:
        return [f"{record.pass_spec}: {record.reason}" for record in self.passes if record.reason]


def rewrite(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: RewriteConfig,
    *,
    weights: Literal["auto", "inline", "external"] = "auto",
    limits: ResourceLimits | None = None,
    progress: Progress | None = None,
) -> RewriteResult:
    """Run passes on the ONNX file `model` and write the result to `output`.

    A pass that measures ranges runs the model in a process within `limits`.

    Passes that are moved, what each pass does, and the parts that it leaves unchanged are reported to `progress`. Raises
    RyzenError if a pass refuses, and if `output` is the model itself or an existing file that is not an ONNX file.
    """
    from ryzen_compile.ir.load import load
    from ryzen_compile.ir.save import save
    from ryzen_compile.ir.text_files import read_text_files, text_folder_name, write_text_files

    check_output(output, source=model)
    graph = load(model)
    text_files = read_text_files(graph, model)
    passes = _parse_passes(config)
    result = _rewrite_graph(
        graph, str(output), config, passes, limits, progress or SilentProgress(), load_source=lambda: load(model)
    )
    if text_files:
        write_text_files(graph, output, text_files, folder=text_folder_name(output))
    save(graph, output, weights=weights, check=False)  # only metadata changed since the check
    return result


def rewrite_steps(
    model: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    config: RewriteConfig,
    widths: Sequence[int],
    *,
    limits: ResourceLimits | None = None,
    progress: Progress | None = None,
) -> tuple[RewriteResult, ...]:
    """Write one graph per step width to `folder`: `step-1.onnx`, `step-any.onnx`, with a shared weight store.

    A width is the number of tokens of a step; 0 means any number. The graphs are steps of one decoder over the same states:
    `build` makes one package of the folder, and loading it makes one engine. All graphs are rewritten before the first is
    written. Raises UsageError if no pass makes decoder steps or `folder` is a file; otherwise raises as `rewrite` does.
    """
    from ryzen_compile.ir.interface_metadata import interface_of, write_interface
    from ryzen_compile.ir.load import load
    from ryzen_compile.ir.save import save_to_store
    from ryzen_compile.ir.text_files import read_text_files, write_text_files

    passes = parse_step_passes(config)
    source, folder = load(model), Path(folder)
    text_files = read_text_files(source, model)
    check_output_folder(folder)
    decoder_group = _decoder_group(source, passes, config)
    rewritten: list[tuple[Path, ir.Model, RewriteResult]] = []
    for width in dict.fromkeys(widths):
        graph, path = source.clone(), folder / f"step-{width or _ANY_WIDTH}.onnx"
        step_passes = tuple(_with_step_width(pass_, width) for pass_ in passes)
        result = _rewrite_graph(
            graph, str(path), config, step_passes, limits, progress or SilentProgress(), load_source=source.clone
        )
        interface = msgspec.structs.replace(interface_of(graph), decoder_group=decoder_group)
        write_interface(graph, interface if width or len(set(widths)) == 1 else _for_prompts(interface))
        rewritten.append((path, graph, result))
    for path, graph, _ in rewritten:
        if text_files:
            write_text_files(graph, path, text_files, folder=_TEXT_FOLDER)
        save_to_store(graph, path, folder / "weights", threshold_bytes=layout.MIN_WEIGHT_FILE_BYTES, check=False)
    return tuple(result for _, _, result in rewritten)


def parse_step_widths(text: str) -> tuple[int, ...]:
    """Parse `1,128,any`: the tokens per step of each graph, with 0 for `any`; raises UsageError for anything else."""
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word != _ANY_WIDTH and not (word.isascii() and word.isdigit() and 0 < int(word) < 2**31):
            raise UsageError(
                f"`{word}` is not a step width", hint="write a number of tokens (1 to 2147483647) or `any`: --steps 1,any"
            )
    return tuple(0 if word == _ANY_WIDTH else int(word) for word in words)


def parse_step_passes(config: RewriteConfig) -> tuple[Pass, ...]:
    """Return the passes of step graphs; raises UsageError if they are invalid, or if none makes steps of a decoder."""
    passes = _parse_passes(config)
    if not any(isinstance(pass_, StepWidthAdjustable) for pass_ in passes):
        raise UsageError("none of these passes makes steps of a decoder", hint="begin with kv-static{capacity=4096}")
    return passes


def _parse_passes(config: RewriteConfig) -> tuple[Pass, ...]:
    return parser.parse(config.passes)


def _with_step_width(pass_: Pass, width: int) -> Pass:
    return pass_.with_step_width(width) if isinstance(pass_, StepWidthAdjustable) else pass_


def _for_prompts(interface: Interface) -> Interface:
    """Return the interface of a graph of any width beside graphs of fixed widths, whose typical step is a chunk of a prompt."""
    from ryzen_compile.runtime.generation.generate import DEFAULT_CHUNK

    seq_dims = {dim for spec in interface.inputs if spec.role == "ids" for dim in (spec.dims or ())[1:] if isinstance(dim, str)}
    sizes = {dim: min(DEFAULT_CHUNK, interface.max_sizes.get(dim, DEFAULT_CHUNK)) for dim in seq_dims}
    return msgspec.structs.replace(interface, typical_sizes=interface.typical_sizes | sizes)


def _decoder_group(source: ir.Model, passes: Sequence[Pass], config: RewriteConfig) -> str:
    """Return a digest of everything that determines the step graphs of one decoder, except their step width."""
    import blake3

    from ryzen_compile.data.loading import samples_digest
    from ryzen_compile.ir.fingerprint import fingerprint
    from ryzen_compile.ir.interface_metadata import interface_of

    samples = None
    if any(pass_.needs_calibration for pass_ in passes):
        samples = samples_digest(config.data, [interface_of(source)], seed=config.seed)
    specs = [pass_fingerprint(_with_step_width(pass_, 0)) for pass_ in passes]
    parts = (fingerprint(source), specs, config.backend, samples, config.seed, code_key(passes))
    return blake3.blake3(msgspec.json.encode(parts)).hexdigest()[:16]


def _rewrite_graph(
    graph: ir.Model,
    path: str,
    config: RewriteConfig,
    passes: tuple[Pass, ...],
    limits: ResourceLimits | None,
    progress: Progress,
    *,
    load_source: Callable[[], ir.Model],
) -> RewriteResult:
    """Run `passes` on `graph` in place, including those that a package for the backend would leave out, and check the result.

    `load_source` returns a new copy of the model, to find the pass whose result is invalid.
    """
    from ryzen_compile.data.loading import load_samples
    from ryzen_compile.ir.interface_metadata import interface_of
    from ryzen_compile.ir.save import check_graph
    from ryzen_compile.pipeline.activation_statistics import mean_cosines, second_moments
    from ryzen_compile.pipeline.range_measurement import measure_ranges

    registry.find_backend(config.backend)
    package_pipeline = pipeline_for(config.backend, passes=config.passes, precision=None, source_half_precision=None)
    package_passes = {pass_.name for pass_ in package_pipeline.passes}
    properties = registry.properties_of(passes)
    ordered, moves = order_and_validate(passes, satisfied_properties(graph, properties))
    interface = interface_of(graph) if any(pass_.needs_calibration for pass_ in ordered) else None
    samples = list(load_samples(config.data, interface, seed=config.seed)) if config.data and interface else ()
    context = PassContext(
        backend=config.backend,
        interface=interface,
        samples=samples,
        measure_ranges=functools.partial(measure_ranges, limits=limits, progress=progress),
        measure_second_moments=functools.partial(second_moments, interface=interface, limits=limits, progress=progress),
        measure_cosines=functools.partial(mean_cosines, interface=interface, limits=limits, progress=progress),
        seed=config.seed,
        progress=progress,
    )
    try:
        pass_log = run_passes(graph, ordered, context, properties)
        check_graph(graph)
    except InvalidGraphError as error:
        raise find_invalid_pass(error, load_source(), ordered, context, properties) from error
    excluded = [pass_ for pass_ in passes if pass_.name not in package_passes]
    for diagnostic in (*_half_precision_diagnostics(excluded), *(move.diagnostic() for move in moves)):
        progress.report(dataclasses.replace(diagnostic, location=Path(path).name))
    for record in pass_log:
        for diagnostic in _pass_diagnostics(record, Path(path).name):
            progress.report(diagnostic)
    return RewriteResult(path=path, passes=pass_log)


def _half_precision_diagnostics(excluded: Sequence[Pass]) -> list[Diagnostic]:
    """Return a warning if passes were run that a package for the same backend leaves out."""
    if not excluded:
        return []
    specs = ", ".join(f"`{pass_}`" for pass_ in excluded)
    return [
        Diagnostic(
            code="half-precision",
            severity="warning",
            message=f"{specs}: the graph uses half precision, which is not intended for CPUs",
            hint="give its backend with --backend",
        )
    ]


def _pass_diagnostics(record: PassRecord, file_name: str) -> Iterator[Diagnostic]:
    """Yield what a pass did and the parts of the graph that it left unchanged."""
    yield Diagnostic(
        code="pass-changed" if record.outcome == "changed" else "pass-unchanged",
        severity="info",
        message=f"{record.pass_spec}: {record.reason} "
        f"({record.nodes_before} -> {record.nodes_after} nodes, {record.seconds:.2f} s)",
        location=file_name,
    )
    for warning in record.warnings:
        message = f"`{record.pass_spec}`: {warning}"
        yield Diagnostic(code="pass-warning", severity="warning", message=message, location=file_name)
    for note in record.notes:
        yield Diagnostic(code="node-unchanged", severity="info", message=f"{record.pass_spec}: {note}", location=file_name)
