"""Compare a package, a model or a module with a baseline."""

from __future__ import annotations

from typing import Any

import click

from ryzen_compile.cli.build_options import criteria_option, data_options, limit_options, shape_options
from ryzen_compile.cli.console import ConsoleProgress, console_options, emit

SECTION = "Measure accuracy"

_CANDIDATE_FORMS = (
    "a package (model.ryzen, model.ryzen#GRAPH@VARIANT), an ONNX file, FILE.py:FUNCTION, recipe:NAME or hf:FOLDER"
)


@click.command("compare")
@click.argument("candidate")
@click.option("--baseline", required=True, help=f"What to compare with: {_CANDIDATE_FORMS}.")
@shape_options
@data_options
@criteria_option
@click.option(
    "--as-given", is_flag=True, help="Run the samples of --data unchanged instead of reshaped to the grid of profiles."
)
@click.option("--max-abs", type=float, help="The maximum absolute difference of any element.")
@click.option("--relative-l2", type=float, help="The maximum relative L2 difference of an output.")
@click.option("--cosine", type=float, help="The minimum cosine similarity of a vector with the baseline's.")
@click.option("--top1", type=float, help="The minimum fraction of rows with the same argmax as the baseline.")
@click.option(
    "--bisect",
    is_flag=True,
    help="If a criterion is not met, find the first pass and node that differ; for two ONNX files, the node.",
)
@click.option("--source", metavar="FILE", help="The ONNX file that a package was built from, for --bisect [the baseline].")
@limit_options
@console_options
def command(
    candidate: str,
    baseline: str,
    as_given: bool,
    max_abs: float | None,
    relative_l2: float | None,
    cosine: float | None,
    top1: float | None,
    bisect: bool,
    source: str | None,
    verbosity: int,
    as_json: bool,
    **options: Any,
) -> int:
    """Compare CANDIDATE with a baseline: packages, ONNX files and PyTorch functions in any combination.

    By default the package's files are run over a grid: the min, opt and max shapes of every profile, with identical and mixed
    rows. Exits with 1 if a criterion is not met, if an output is missing, or if nothing was compared.
    """
    from ryzen_compile import api
    from ryzen_compile.report import text as report

    result = api.compare(
        candidate,
        baseline,
        **options,
        as_given=as_given,
        max_abs=max_abs,
        relative_l2=relative_l2,
        cosine=cosine,
        top1=top1,
        bisect=bisect,
        source=source,
        progress=ConsoleProgress(verbosity),
    )
    if as_json:
        emit({"comparisons": result.comparisons, "met": result.met, "divergence": result.divergence}, result.diagnostics)
    else:
        if verbosity >= 0:
            click.echo(report.format_comparisons(result.comparisons, brief=verbosity <= 0))
        if result.divergence is not None:
            click.echo(result.divergence.message)
    return 0 if result.met else 1
