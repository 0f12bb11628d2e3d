"""Export a PyTorch module to ONNX, compared with the module before it is kept."""

from __future__ import annotations

import click

from ryzen_compile.cli.build_options import SEED, FiniteFloat
from ryzen_compile.cli.console import ConsoleProgress, console_options, emit, format_size, format_table


@click.command("export")
@click.argument("what")
@click.argument("output", required=False)
@click.option("--opset", type=int, help="The ONNX opset [what suits the recipe].")
@click.option("--dynamic", multiple=True, metavar="NAME:0=batch,1=seq", help="Dimensions that vary, by input; repeat.")
@click.option("--max-abs", type=FiniteFloat(0), help="The most that an output may differ from the module's [the recipe's].")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the samples that the graph is compared on.")
@console_options
def command(
    what: str,
    output: str | None,
    opset: int | None,
    dynamic: tuple[str, ...],
    max_abs: float | None,
    seed: int,
    verbosity: int,
    as_json: bool,
) -> None:
    """Export WHAT to the ONNX file OUTPUT [NAME.onnx].

    WHAT is a recipe (`minilm`, `vit-b`, `resnet`, `llama`), or FILE.py:FUNCTION where the function returns a module and its
    sample inputs. The graph is compared with the module on samples; where they differ nothing is written.
    """
    from pathlib import Path

    from ryzen_compile.cli.output_paths import check_output

    path = output or f"{Path(what.partition(':')[0]).stem}.onnx"
    check_output(path)

    from ryzen_compile.exporter import export, parse_dynamic

    report = export(
        what.removeprefix("recipe:"),
        path,
        opset=opset,
        dynamic=parse_dynamic(dynamic),
        max_abs=max_abs,
        seed=seed,
        progress=ConsoleProgress(verbosity),
    )
    if as_json:
        emit(report)
    elif verbosity >= 0:
        click.echo(
            f"{report.path}  {format_size(report.size_bytes)}, {report.nodes} nodes, opset {report.opset}, by {report.strategy}"
        )
        click.echo("\n".join([*(f"  takes {one}" for one in report.inputs), *(f"  gives {one}" for one in report.outputs)]))
        click.echo(f"  compared with the module in {report.cases} cases")
        rows = [(one.output, f"max abs {one.max_abs:.3g}", f"at most {one.bound:.3g}", one.case) for one in report.deviations]
        click.echo(format_table(rows, indent="    "))
        for note in report.notes:
            click.echo(f"  note: {note}")
