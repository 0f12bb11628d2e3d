"""Evaluate a decoder with caches of fixed size on text, tasks and long generation, against its PyTorch baseline."""

from __future__ import annotations

import click

from ryzen_compile.cli.build_options import SEED, FiniteFloat
from ryzen_compile.cli.console import ConsoleProgress, console_options, emit


@click.command("evaluate")
@click.argument("candidate")
@click.option("--baseline", required=True, metavar="RECIPE", help="recipe:NAME or FILE.py:FUNCTION that makes a Recipe.")
@click.option("--data", metavar="SAMPLES", help="Documents: FILE.npz, a folder of them, FILE.py[:FUNCTION] [the recipe's].")
@click.option(
    "--require", multiple=True, metavar="CRITERION", help="As perplexity<=1.01x, x the baseline's, or kl<=0.02; repeat."
)
@click.option("--documents", type=click.IntRange(0), default=8, show_default=True, help="How many are foretold.")
@click.option("--tokens", type=click.IntRange(2), help="How many tokens of each [all that the decoder takes].")
@click.option("--questions", type=click.IntRange(0), default=50, show_default=True, help="How many of each task.")
@click.option("--continuations", type=click.IntRange(0), default=4, show_default=True, help="How many documents are continued.")
@click.option("--prompt", type=click.IntRange(1), default=64, show_default=True, help="Behind so many of their tokens.")
@click.option("--new-tokens", type=click.IntRange(1), help="By so many tokens [8 times what a head keeps].")
@click.option("--temperature", type=FiniteFloat(0), default=1.0, show_default=True, help="Of continuations; 0 is greedy.")
@click.option("--chunk", type=click.IntRange(1), default=1, show_default=True, help="Tokens of text and prompts a step.")
@click.option("--rows", type=click.IntRange(1), default=8, show_default=True, help="Sequences run together.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of all that is random.")
@click.option("--graph", help="The graph, where a package holds several that are no steps of one decoder.")
@click.option("--backend", help="The backend that runs it [the best here].")
@console_options
def command(
    candidate: str,
    baseline: str,
    data: str | None,
    require: tuple[str, ...],
    documents: int,
    tokens: int | None,
    questions: int,
    continuations: int,
    prompt: int,
    new_tokens: int | None,
    temperature: float,
    chunk: int,
    rows: int,
    seed: int,
    graph: str | None,
    backend: str | None,
    verbosity: int,
    as_json: bool,
) -> int:
    """Measure SUBJECT, a package or an ONNX file, beside the baseline and beside the baseline with the same method in torch.

    The result is recorded in the package. Exits with 1 where a criterion is not met.
    """
    from ryzen_compile.cli import report
    from ryzen_compile.evaluation.evaluate import EvalConfig, evaluate

    amounts = EvalConfig(
        documents=documents,
        tokens=tokens,
        questions=questions,
        continuations=continuations,
        prompt_tokens=prompt,
        new_tokens=new_tokens,
        temperature=temperature,
        chunk_size=chunk,
        batch_size=rows,
        seed=seed,
    )
    result = evaluate(
        candidate,
        baseline=baseline,
        data=data,
        requirements=require,
        config=amounts,
        graph=graph,
        backend=backend,
        progress=ConsoleProgress(verbosity),
    )
    if as_json:
        emit(result)
    elif verbosity >= 0:
        click.echo(report.format_evaluation(result))
    return 0 if result.met else 1
