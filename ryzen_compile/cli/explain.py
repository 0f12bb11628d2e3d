"""Print the plan of a build: its passes, the facts of the model, and what would be refused; builds nothing."""

from __future__ import annotations

import re
from typing import Any

import click

from ryzen_compile.cli.build_options import (
    builder_options,
    data_options,
    parse_model_arguments,
    pop_builder_options,
    shape_options,
)
from ryzen_compile.cli.console import ConsoleProgress, console_options, emit, format_table


@click.command("explain")
@click.argument("model", nargs=-1, required=True)
@click.option(
    "--gpu", default="auto", show_default=True, help="Targets: cpu, sm89, rtx4090, sm89@windows, auto; commas between."
)
@click.option("--backend", help="Use this backend only.")
@click.option("-p", "--passes", help="Passes, as `fold,precision{to=fp16}`; `none` for none [those that suit the backend].")
@shape_options
@data_options
@builder_options
@console_options
def command(model: tuple[str, ...], verbosity: int, as_json: bool, **config_fields: Any) -> int:
    """Print what `build` would do with MODEL and why: plan, facts, moves, problems, targets, shapes.

    Exits with 1 where the plan cannot run or a target is refused.
    """
    talk = ConsoleProgress(verbosity)
    files = parse_model_arguments(model)
    options, precision = pop_builder_options(config_fields, talk)

    from ryzen_compile.builder.config import BuildConfig
    from ryzen_compile.builder.explain import explain

    found = explain(files, BuildConfig(**config_fields, precision=precision, options=options), talk)  # type: ignore[arg-type]
    if as_json:
        emit(found)
    else:
        for graph in found.graphs:
            click.echo(f"graph {graph.name}, {graph.nodes} nodes, from {graph.source}")
            click.echo("\n".join(f"  shapes {profile}" for profile in graph.profiles))
            click.echo(
                format_table(
                    [("holds" if fact.holds else "fails", fact.name, fact.message) for fact in graph.properties], indent="  "
                )
            )
            for plan in graph.pipelines:
                click.echo(f"\n  {plan.variant} for {', '.join(plan.targets) or 'the CPU, as the portable graph'}")
                for step in plan.passes:
                    click.echo(f"    {step.pass_spec}: {_drop_zero_sizes(step.estimate)}")
                for line in (*plan.notes, *plan.moves):
                    click.echo(f"    note: {line}")
                for problem in plan.problems:
                    click.echo(f"    {problem}\n        hint: {problem.hint}")
        for refused in found.unsupported_targets:
            click.echo(
                f"\nrefused: {refused.target}: {refused.reason}" + (f"\n    hint: {refused.hint}" if refused.hint else "")
            )
    if found.unsupported_targets or any(plan.problems for graph in found.graphs for plan in graph.pipelines):
        return 1
    return 0


def _drop_zero_sizes(estimate: str) -> str:
    """Return an estimate without sizes that round to nothing; one that counts nothing expects no change."""
    shown = re.sub(r"[+-]0\.0 MB of (weights|states)(, |$)", "", estimate).removesuffix(", ")
    counts = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", shown)]
    return shown if any(counts) else "no change expected"
