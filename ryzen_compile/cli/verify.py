"""Check a package on the machine it is on: digests, then accuracy; the result is recorded in it."""

from __future__ import annotations

import click

from ryzen_compile.cli.build_options import SEED
from ryzen_compile.cli.console import ConsoleProgress, console_options, emit


@click.command("verify")
@click.argument("package")
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    metavar="[GRAPH=]BASELINE",
    help="What to compare with: an ONNX file, FILE.py:FUNCTION, recipe:NAME; for several graphs one each [the portable graph].",
)
@click.option(
    "--data", metavar="SAMPLES", help="FILE.npz, a folder of them, FILE.py[:FUNCTION] or recipe:NAME [seeded values]."
)
@click.option("--criteria", metavar="FILE", help="A success_criteria.toml [the project's].")
@click.option("--seed", type=SEED, default=0, show_default=True)
@console_options
def command(
    package: str,
    baselines: tuple[str, ...],
    data: str | None,
    criteria: str | None,
    seed: int,
    verbosity: int,
    as_json: bool,
) -> int:
    """Check every digest of PACKAGE, run what can run here, compare it, and record the result in the manifest.

    Engines that run here become *executed* or *compared* on this machine. Exits with 1 where a criterion is not met.
    """
    from ryzen_compile.cli import report
    from ryzen_compile.numerics.verify import parse_baselines, verify

    made, results = verify(
        package,
        baseline=parse_baselines(baselines),
        data=data,
        criteria=criteria,
        seed=seed,
        progress=ConsoleProgress(verbosity),
    )
    if as_json:
        emit({"manifest": made.manifest, "comparisons": results})
    elif verbosity >= 0:
        click.echo("\n\n".join(map(report.format_comparison, results)))
        click.echo(f"\nrecorded in {made.path}")
    if not all(result.met for result in results):
        return 1
    return 0
