"""Evaluate a decoder with fixed-size KV caches on text, tasks and long generation, against its PyTorch baseline."""

from __future__ import annotations

from typing import Any

import click

from ryzen_compile.cli.build_options import SEED, FiniteFloat, limit_options
from ryzen_compile.cli.console import ConsoleProgress, console_options, emit

SECTION = "Measure accuracy"
COUNT = click.IntRange(1)


@click.command("evaluate")
@click.argument("candidate")
@click.option(
    "--baseline", required=True, metavar="RECIPE", help="recipe:NAME, hf:FOLDER, or FILE.py:FUNCTION that returns a Recipe."
)
@click.option(
    "--data", metavar="SAMPLES", help="Documents: FILE.txt, FILE.npz, a folder of them, FILE.py[:FUNCTION] [the recipe's]."
)
@click.option(
    "--require",
    multiple=True,
    metavar="REQUIREMENT",
    help="A requirement, as in perplexity<=1.01x (relative to the baseline) or kl<=0.02; repeat.",
)
@click.option(
    "--documents", type=click.IntRange(0), default=8, show_default=True, help="The number of documents for perplexity."
)
@click.option("--tokens", type=click.IntRange(2), help="The maximum tokens per document [the decoder's capacity].")
@click.option("--questions", type=click.IntRange(0), default=50, show_default=True, help="The number of questions per task.")
@click.option(
    "--continuations", type=click.IntRange(0), default=4, show_default=True, help="The number of documents to continue."
)
@click.option(
    "--prompt",
    "prompt_tokens",
    type=COUNT,
    default=64,
    show_default=True,
    help="The tokens of each document before its continuation.",
)
@click.option("--new-tokens", type=COUNT, help="The tokens per continuation [8 times the tokens that a head keeps].")
@click.option(
    "--temperature",
    type=FiniteFloat(0),
    default=1.0,
    show_default=True,
    help="The sampling temperature of continuations; 0 is greedy.",
)
@click.option(
    "--chunk", "chunk_size", type=COUNT, default=1, show_default=True, help="The tokens per step for documents and prompts."
)
@click.option("--rows", "batch_size", type=COUNT, default=8, show_default=True, help="The batch size.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="The seed of all random values.")
@click.option("--graph", help="The graph, if a package holds several that are not steps of one decoder.")
@click.option("--variant", help="The variant, or the beginning of its name [the first].")
@click.option("--statistics", metavar="PATH", help="The statistics file of a calibrated score [beside the candidate].")
@click.option("--backend", help="The backend to run on [the first that can run it here].")
@click.option("--quick", is_flag=True, help="Measure a sample: 2 documents, 5 questions per task, 1 continuation.")
@limit_options
@console_options
def command(
    candidate: str,
    baseline: str,
    data: str | None,
    require: tuple[str, ...],
    graph: str | None,
    variant: str | None,
    statistics: str | None,
    backend: str | None,
    quick: bool,
    verbosity: int,
    as_json: bool,
    **options: Any,
) -> int:
    """Evaluate CANDIDATE, a package or an ONNX file, against the PyTorch baseline, with the same KV method and without.

    A package may name a graph and a variant: model.ryzen#GRAPH@VARIANT.

    The result is recorded in the package. Exits with 1 if a requirement is not met.
    """
    from ryzen_compile import api
    from ryzen_compile.artifacts.package.diagnostics import evaluation_diagnostics
    from ryzen_compile.report import text as report

    result = api.evaluate(
        candidate,
        baseline=baseline,
        data=data,
        requirements=require,
        **options,
        quick=quick,
        graph=graph,
        variant=variant,
        backend=backend,
        statistics=statistics,
        progress=ConsoleProgress(verbosity),
    )
    if as_json:
        emit(result, evaluation_diagnostics(result, severity="error"))
    elif verbosity >= 0:
        click.echo(report.format_evaluation(result))
    return 0 if result.met else 1
