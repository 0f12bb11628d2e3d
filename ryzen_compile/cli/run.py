"""Run a package once and show or save what it gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ryzen_compile.cli.build_options import SEED, check_data_excludes_shapes, validate_shapes
from ryzen_compile.cli.console import ConsoleProgress, console_options, emit, format_table


@click.command("run")
@click.argument("package")
@click.option("--graph", help="The graph to run, where the package holds several.")
@click.option("--backend", help="Run it by this backend only.")
@click.option(
    "--data", metavar="SAMPLES", help="FILE.npz, a folder of them, FILE.py[:FUNCTION] or recipe:NAME [seeded values]."
)
@click.option(
    "--shapes",
    metavar="NAME:1x8,...",
    callback=validate_shapes,
    help="The shapes of seeded values [what the package is tuned for].",
)
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option("--save-inputs", metavar="FILE.npz", help="Save what went in; --data takes it back.")
@click.option("--save-outputs", metavar="FILE.npz", help="Save what came out.")
@console_options
def command(
    package: str,
    graph: str | None,
    backend: str | None,
    data: str | None,
    shapes: str | None,
    seed: int,
    save_inputs: str | None,
    save_outputs: str | None,
    verbosity: int,
    as_json: bool,
) -> None:
    """Run PACKAGE once, on the first sample, and show what it gives."""
    check_data_excludes_shapes(data, shapes)

    from ryzen_compile.artifacts.package.read import read_package
    from ryzen_compile.cli.report import accuracy_warning
    from ryzen_compile.runtime.load import load

    talk = ConsoleProgress(verbosity)
    with load(package, graph=graph, backend=backend) as engine:
        talk.message(f"{engine.choice.summary}; loaded in {engine.load_seconds:.2f} s")
        if warning := accuracy_warning(read_package(package).manifest, engine.choice.path):
            talk.message(warning)
        feed = load_inputs(engine, data, shapes, seed)
        outputs = engine.run(feed)
    for file, arrays in ((save_inputs, feed), (save_outputs, outputs)):
        if file:
            _save(file, arrays)
    rows = [_summarize(name, array) for name, array in outputs.items()]
    if as_json:
        emit({"served_by": engine.choice.summary, "outputs": rows})
    else:
        lines = [(row["name"], f"{row['dtype']}{row['shape']}", _format_summary(row)) for row in rows]
        click.echo(format_table(lines))


def load_inputs(engine: Any, data: str | None, shapes: str | None, seed: int) -> dict[str, Any]:
    """Return one feed for a loaded engine: the first of `data`, or seeded values of `shapes`."""
    from ryzen_compile.data.loading import load_samples
    from ryzen_compile.data.synthetic import synthesize
    from ryzen_compile.spec import profile

    if data is not None:
        return dict(next(iter(load_samples(data, engine.interface, seed=seed))))
    wanted = (
        engine.profiles[0].opt if shapes is None else profile.resolve_profiles(engine.interface, opt_shapes=[shapes])[0].opt
    )
    return dict(synthesize(engine.interface, wanted, seed=seed, rows="mixed"))


def _save(file: str, arrays: dict[str, Any]) -> None:
    import numpy as np

    from ryzen_compile.errors import RyzenError
    from ryzen_compile.utils.atomic_file import atomic_path

    try:
        with atomic_path(Path(file)) as hidden, open(hidden, "wb") as writing:
            np.savez(writing, **arrays)
    except OSError as error:
        raise RyzenError(f"`{file}` cannot be written: {error.strerror}") from error


def _summarize(name: str, array: Any) -> dict[str, Any]:
    """Return what JSON tells of an output: its least, mean and largest element, or the first where they are words."""
    import numpy as np

    values = np.asarray(array)
    about: dict[str, Any] = {"name": name, "dtype": str(values.dtype), "shape": list(values.shape)}
    if values.dtype.kind in "OUS" or not values.size:
        return about | {"first": [str(value) for value in values.ravel()[:4]]}
    wide = values.astype(np.float64)
    finite = wide[np.isfinite(wide)]
    told = {"min": finite.min(), "mean": finite.mean(), "max": finite.max()} if finite.size else {}
    return about | {word: float(value) for word, value in told.items()} | {"not_finite": int(wide.size - finite.size)}


def _format_summary(summary: dict[str, Any]) -> str:
    if "first" in summary:
        return ", ".join(summary["first"])
    told = [f"{word} {summary[word]:.6g}" for word in ("min", "mean", "max") if word in summary]
    return ", ".join(told + ([f"{summary['not_finite']} not finite"] if summary["not_finite"] else []))
