"""Export of a decoder to step graphs with KV caches of fixed size: an export, and a rewrite of its result."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ryzen_compile.builder.rewrite import RewriteConfig, RewriteResult, parse_step_passes, rewrite_steps
from ryzen_compile.diagnostic import Diagnostic
from ryzen_compile.errors import ModelError, RyzenError, UsageError, printable
from ryzen_compile.ir.output_path import check_output_folder

if TYPE_CHECKING:
    from ryzen_compile.exporter import ExportReport
    from ryzen_compile.processes.limits import ResourceLimits
    from ryzen_compile.progress import Progress
    from ryzen_compile.spec.interface import Interface

DEFAULT_CAPACITY = 4096
"""The largest number of tokens of a sequence if no passes are given; fewer if the model has fewer positions."""


def export_steps(
    export: Callable[[Path], ExportReport],
    folder: str | os.PathLike[str],
    *,
    passes: str | None,
    widths: Sequence[int],
    data: str | None = None,
    seed: int = 0,
    limits: ResourceLimits | None = None,
    progress: Progress,
) -> tuple[RewriteResult, ...]:
    """Call `export` with the path of a temporary ONNX file, and write step graphs of the result to `folder`.

    `passes`, `widths` and `limits` are as for `rewrite_steps`; without passes, `kv-static` makes caches of DEFAULT_CAPACITY
    tokens.

    Raises ModelError if the model is not a decoder with growing caches, and the errors of both steps; `folder` is written last.
    """
    from ryzen_compile.ir.interface_metadata import interface_of
    from ryzen_compile.ir.load import load

    target = Path(folder)
    check_request(target, passes)
    try:
        scratch = tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name[:100]}.")
    except OSError as error:
        raise RyzenError(
            f"`{printable(target)}` cannot be written: {error.strerror}", hint="choose a folder with write permission"
        ) from error
    with scratch as name:
        model = Path(name) / "model.onnx"
        report = export(model)
        interface = interface_of(load(model))
        check_is_decoder(report.name, interface)
        progress.report(
            Diagnostic(code="module-compared", severity="info", message=_describe_comparison(report), location=report.name)
        )
        capacity = min(_positions(interface), DEFAULT_CAPACITY)
        config = RewriteConfig(passes=passes or f"kv-static{{capacity={capacity}}}", data=data, seed=seed)
        return rewrite_steps(model, target, config, widths, limits=limits, progress=progress)


def check_request(folder: Path, passes: str | None) -> None:
    """Raise UsageError if step graphs cannot be written to `folder`, or `passes` are invalid or make no steps of a decoder."""
    check_output_folder(folder)
    if not folder.parent.is_dir():
        raise UsageError(f"there is no folder `{printable(folder.parent)}`", hint=f"mkdir -p {printable(folder.parent)}")
    if passes is not None:
        parse_step_passes(RewriteConfig(passes=passes))


def check_is_decoder(name: str, interface: Interface) -> None:
    """Raise ModelError if the model `name` has no KV caches that grow."""
    if not any(state.append_axis is not None for state in interface.states):
        raise ModelError(
            f"`{name}` is not a decoder with KV caches, so it has no step graphs",
            hint="export it to one file: give an output path that ends in .onnx",
        )


def _describe_comparison(report: ExportReport) -> str:
    """Return how well the exported graph agrees with its module, and the notes of the export."""
    worst = max(report.deviations, key=lambda deviation: deviation.bound_fraction)
    deviation = f"`{worst.output}` within {worst.max_abs:.3g} (at most {worst.bound:.3g})"
    return "; ".join((f"compared with the module in {report.cases} cases: {deviation}", *report.notes))


def _positions(interface: Interface) -> int:
    """Return the number of positions of the model, or DEFAULT_CAPACITY if it has no limit."""
    highs = [int(spec.high) + 1 for spec in interface.inputs if spec.role == "positions" and spec.high is not None]
    return min(highs, default=DEFAULT_CAPACITY)
