"""Export a PyTorch module to ONNX and compare the graph with the module before it is written."""

from __future__ import annotations

import click

from ryzen_compile.cli.build_options import SAMPLES_HELP, SEED, FiniteFloat, limit_options
from ryzen_compile.cli.completion import complete_passes, complete_recipes
from ryzen_compile.cli.console import ConsoleProgress, console_options, emit
from ryzen_compile.errors import UsageError
from ryzen_compile.report.formatting import format_size, format_table

SECTION = "Compile"


@click.command("export")
@click.argument("what", shell_complete=complete_recipes)
@click.argument("output", required=False)
@click.option("--opset", type=int, help="The ONNX opset [the recipe's].")
@click.option(
    "--dynamic",
    multiple=True,
    metavar="NAME:0=batch,1=seq",
    help="Dynamic dimensions of an input, or of all that match past*, with or without a range: wave:1=time:400..16000; repeat.",
)
@click.option("--max-abs", type=FiniteFloat(0), help="The maximum absolute difference from the module [the recipe's].")
@click.option("--seed", type=SEED, default=0, show_default=True, help="The seed of the samples for the comparison.")
@click.option("--task", metavar="TASK", help="The task of hf:FOLDER, as in feature-extraction [that of its configuration].")
@click.option(
    "-p", "--passes", shell_complete=complete_passes, help="Passes of the graphs in a folder [kv-static with 4,096 tokens]."
)
@click.option("--steps", metavar="1,any", help="The step widths of the graphs in a folder [1,any].")
@click.option("--data", metavar="SAMPLES", help=f"Calibration samples of the passes of the graphs in a folder: {SAMPLES_HELP}.")
@limit_options
@console_options
def command(
    what: str,
    output: str | None,
    opset: int | None,
    dynamic: tuple[str, ...],
    max_abs: float | None,
    seed: int,
    task: str | None,
    passes: str | None,
    steps: str | None,
    data: str | None,
    memory_limit_bytes: int | None,
    time_limit_seconds: float | None,
    verbosity: int,
    as_json: bool,
) -> None:
    """Export WHAT to the ONNX file OUTPUT [NAME.onnx].

    WHAT is hf:FOLDER, a Hugging Face folder (config.json, *.safetensors and tokenizer.json, or one .gguf file); a recipe
    (`minilm`, `vit-b`, `resnet`, `llama`); or FILE.py:FUNCTION, whose code is run and whose function returns a module and its
    sample inputs, by name or in the order of `forward`. A module that returns a dict names its outputs. The graph is compared
    with the module on samples; if they differ, nothing is written.

    With an OUTPUT that ends in `/`, a language model is written as graphs for prompts and for single tokens, with KV caches of
    fixed size: what `build` makes a package for `generate` of.
    """

    from ryzen_compile import api
    from ryzen_compile.exporter import parse_dynamic

    if task is not None:
        if not what.startswith("hf:") or "#" in what:
            raise UsageError("--task selects the task of hf:FOLDER", hint="leave it out")
        what = f"{what}#{task}"
    if output is not None and output.endswith("/"):
        results = api.export_steps(
            what,
            output.rstrip("/") or "/",
            passes=passes,
            steps=steps or "1,any",
            opset=opset,
            dynamic=parse_dynamic(dynamic),
            max_abs=max_abs,
            data=data,
            seed=seed,
            memory_limit_bytes=memory_limit_bytes,
            time_limit_seconds=time_limit_seconds,
            progress=ConsoleProgress(verbosity),
        )
        if as_json:
            emit({"graphs": results})
        elif verbosity >= 0:
            click.echo("\n".join(result.path for result in results))
            click.echo(f"next: ryzen-compile build {output} --gpu cpu")
        return
    if (passes, steps, data) != (None, None, None):
        raise UsageError("--passes, --steps and --data are for graphs in a folder", hint="end OUTPUT with `/`: dec/")
    report = api.export(
        what,
        output,
        opset=opset,
        dynamic=parse_dynamic(dynamic),
        max_abs=max_abs,
        seed=seed,
        memory_limit_bytes=memory_limit_bytes,
        time_limit_seconds=time_limit_seconds,
        progress=ConsoleProgress(verbosity),
    )
    if as_json:
        emit(report)
    elif verbosity >= 0:
        click.echo(
            f"{report.path}  {format_size(report.size_bytes)}, {report.nodes} nodes, opset {report.opset}, by {report.strategy}"
        )
        click.echo(
            "\n".join([*(f"  input {spec}" for spec in report.inputs), *(f"  output {spec}" for spec in report.outputs)])
        )
        if report.sizes:
            click.echo("  sizes " + ", ".join(f"{dim} {size_range}" for dim, size_range in report.sizes.items()))
        click.echo(f"  compared with the module in {report.cases} cases")
        rows = [
            (deviation.output, f"max abs {deviation.max_abs:.3g}", f"at most {deviation.bound:.3g}", deviation.case)
            for deviation in report.deviations
        ]
        click.echo(format_table(rows, indent="    "))
        for note in report.notes:
            click.echo(f"  note: {note}")
        click.echo(f"next: ryzen-compile build {report.path} --gpu cpu")
