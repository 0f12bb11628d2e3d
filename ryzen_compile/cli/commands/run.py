"""Run a package or an ONNX file once and show or save its outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ryzen_compile.cli.build_options import SAMPLES_HELP, SEED, check_data_excludes_shapes, validate_shapes
from ryzen_compile.cli.console import ConsoleProgress, console_options, emit
from ryzen_compile.diagnostic import Diagnostic
from ryzen_compile.report.formatting import format_table

SECTION = "Run"


@click.command("run")
@click.argument("package")
@click.option("--graph", help="The graph to run, if the package holds several.")
@click.option("--variant", help="The variant to run, or the beginning of its name [the first].")
@click.option("--backend", help="Use only this backend.")
@click.option("--data", metavar="SAMPLES", help=f"{SAMPLES_HELP} [random values].")
@click.option(
    "--shapes",
    metavar="NAME:1x8,...",
    callback=validate_shapes,
    help="The shapes of random values [the opt shapes of the package].",
)
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option("--save-inputs", metavar="FILE.npz", help="Save the inputs, in a form that --data accepts.")
@click.option("--save-outputs", metavar="FILE.npz", help="Save the outputs.")
@console_options
def command(
    package: str,
    graph: str | None,
    variant: str | None,
    backend: str | None,
    data: str | None,
    shapes: str | None,
    seed: int,
    save_inputs: str | None,
    save_outputs: str | None,
    verbosity: int,
    as_json: bool,
) -> None:
    """Run PACKAGE (model.ryzen, model.ryzen#GRAPH@VARIANT, or an ONNX file) once, on the first sample, and show its outputs.

    A FILE.py in --data is executed.
    """
    check_data_excludes_shapes(data, shapes)

    from ryzen_compile.artifacts.package.diagnostics import accuracy_warning
    from ryzen_compile.artifacts.package.read import read_package
    from ryzen_compile.artifacts.package.reference import parse_load_request
    from ryzen_compile.runtime.load import load

    progress = ConsoleProgress(verbosity)
    request = parse_load_request(package, graph=graph, variant=variant, backend=backend)
    with load(request.path, graph=request.graph, variant=request.variant, backend=request.backend) as engine:
        message = f"{engine.choice.summary}; loaded in {engine.load_seconds:.2f} s"
        progress.report(Diagnostic(code="engine-chosen", severity="info", message=message))
        if request.path.is_dir() and (warning := accuracy_warning(read_package(request.path).manifest, engine.choice.path)):
            progress.report(warning)
        inputs = load_inputs(engine, data, shapes, seed)
        outputs = engine.run(inputs)
    for file, arrays in ((save_inputs, inputs), (save_outputs, outputs)):
        if file:
            _save(file, arrays)
    summaries = [_summarize(name, array) for name, array in outputs.items()]
    if as_json:
        emit({"choice": engine.choice.summary, "outputs": summaries})
    else:
        rows = [(summary["name"], f"{summary['dtype']}{summary['shape']}", _format_summary(summary)) for summary in summaries]
        click.echo(format_table(rows))


def load_inputs(engine: Any, data: str | None, shapes: str | None, seed: int) -> dict[str, Any]:
    """Return inputs for a loaded engine: the first sample of `data`, or random values of `shapes`."""
    from ryzen_compile.data.loading import load_samples
    from ryzen_compile.data.synthetic import synthesize
    from ryzen_compile.spec import profile

    if data is not None:
        return dict(next(iter(load_samples(data, engine.interface, seed=seed))))
    profiles = engine.profiles if shapes is None else profile.resolve_profiles(engine.interface, opt_shapes=[shapes])
    return dict(synthesize(engine.interface, profiles[0].opt, seed=seed, rows="mixed"))


def _save(file: str, arrays: dict[str, Any]) -> None:
    import numpy as np

    from ryzen_compile.errors import RyzenError
    from ryzen_compile.utils.atomic_file import atomic_path

    try:
        with atomic_path(Path(file)) as temporary, open(temporary, "wb") as stream:
            np.savez(stream, **arrays)
    except OSError as error:
        raise RyzenError(f"`{file}` cannot be written: {error.strerror}") from error


def _summarize(name: str, array: Any) -> dict[str, Any]:
    """Return the JSON summary of an output: minimum, mean and maximum, or the first elements if it holds strings."""
    import numpy as np

    values = np.asarray(array)
    summary: dict[str, Any] = {"name": name, "dtype": str(values.dtype), "shape": list(values.shape)}
    if values.dtype.kind in "OUS" or not values.size:
        return summary | {"first": [str(value) for value in values.ravel()[:4]]}
    as_float64 = values.astype(np.float64)
    finite = as_float64[np.isfinite(as_float64)]
    statistics = {"min": finite.min(), "mean": finite.mean(), "max": finite.max()} if finite.size else {}
    not_finite = int(as_float64.size - finite.size)
    return summary | {name: float(value) for name, value in statistics.items()} | {"not_finite": not_finite}


def _format_summary(summary: dict[str, Any]) -> str:
    if "first" in summary:
        return ", ".join(summary["first"])
    statistics = [f"{name} {summary[name]:.6g}" for name in ("min", "mean", "max") if name in summary]
    return ", ".join(statistics + ([f"{summary['not_finite']} not finite"] if summary["not_finite"] else []))
