"""Verify a package on this machine: digests, then accuracy; the result is recorded in the package."""

from __future__ import annotations

import click

from ryzen_compile.cli.build_options import SAMPLES_HELP, SEED, criteria_option, limit_options
from ryzen_compile.cli.console import ConsoleProgress, console_options, emit

SECTION = "Measure accuracy"


@click.command("verify")
@click.argument("package")
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    metavar="[GRAPH=]BASELINE",
    help="ONNX file, FILE.py:FUNCTION, recipe:NAME or hf:FOLDER; repeat with GRAPH= for several graphs [the portable variant].",
)
@click.option("--data", metavar="SAMPLES", help=f"{SAMPLES_HELP} [random values].")
@criteria_option
@click.option("--seed", type=SEED, default=0, show_default=True)
@limit_options
@console_options
def command(
    package: str,
    baselines: tuple[str, ...],
    data: str | None,
    criteria: str | None,
    seed: int,
    memory_limit_bytes: int | None,
    time_limit_seconds: float | None,
    verbosity: int,
    as_json: bool,
) -> int:
    """Verify every digest of PACKAGE, run and compare what can run on this machine, and record the results in the manifest.

    The provenance of engines that run here becomes *executed* or *compared*. Exits with 1 if a criterion is not met.
    """
    from ryzen_compile import api
    from ryzen_compile.numerics.verify import parse_baselines
    from ryzen_compile.report import text as report

    result = api.verify(
        package,
        baseline=parse_baselines(baselines),
        data=data,
        criteria=criteria,
        seed=seed,
        memory_limit_bytes=memory_limit_bytes,
        time_limit_seconds=time_limit_seconds,
        progress=ConsoleProgress(verbosity),
    )
    if as_json:
        emit(
            {"path": str(result.package.path), "manifest": result.package.manifest, "comparisons": result.comparisons},
            result.diagnostics,
        )
    elif verbosity >= 0:
        click.echo(report.format_comparisons(result.comparisons, brief=verbosity <= 0))
        click.echo(f"\nrecorded in {result.package.path}")
    return 0 if result.met else 1
