"""Run passes on an ONNX file and write the resulting graph, without building a package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import click

from ryzen_compile.cli.build_options import SEED
from ryzen_compile.cli.console import ConsoleProgress, console_options, emit
from ryzen_compile.errors import UsageError

if TYPE_CHECKING:
    from ryzen_compile.builder.rewrite import RewriteResult

SECTION = "Compile"


@click.command("rewrite")
@click.argument("model")
@click.argument("output")
@click.option("-p", "--passes", required=True, help="Passes, as in `fold,precision{to=fp16}`.")
@click.option("--backend", default="onnxruntime", show_default=True, help="The backend that the result is intended for.")
@click.option(
    "--steps",
    metavar="1,any",
    help="Write one graph per step width of a decoder, in tokens or `any`, to the folder OUTPUT.",
)
@click.option("--data", metavar="SAMPLES", help="Calibration samples: FILE.npz, FILE.py[:FUNCTION] or recipe:NAME.")
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option("--weights", type=click.Choice(["auto", "inline", "external"]), default="auto", show_default=True)
@console_options
def command(
    model: str,
    output: str,
    passes: str,
    backend: str,
    steps: str | None,
    data: str | None,
    seed: int,
    weights: Literal["auto", "inline", "external"],
    verbosity: int,
    as_json: bool,
) -> None:
    """Run passes on MODEL, verify their declared properties, and write the graph to OUTPUT.

    Every given pass is run, including conversions to half precision that a package leaves out of its portable graph. With
    --steps, OUTPUT is a folder of graphs over the same states and weights; `build` makes one package of it, and its engine
    selects the graph for the width of each step.
    """
    from ryzen_compile.builder.rewrite import RewriteConfig, parse_step_widths, rewrite, rewrite_steps
    from ryzen_compile.cli.output_paths import check_output

    progress = ConsoleProgress(verbosity)
    config = RewriteConfig(passes=passes, backend=backend, data=data, seed=seed)
    if steps is None:
        check_output(output, source=model)
        results: tuple[RewriteResult, ...] = (rewrite(model, output, config, weights=weights, progress=progress),)
    elif weights == "auto":
        results = rewrite_steps(model, output, config, parse_step_widths(steps), progress=progress)
    else:
        raise UsageError(
            f"--weights {weights}: the graphs of --steps share one weight store", hint="leave one of the two options out"
        )
    for result in results:
        if as_json:
            emit({"path": result.path, "passes": result.passes})
        else:
            _print_result(progress, result, with_path=len(results) > 1)


def _print_result(progress: ConsoleProgress, result: RewriteResult, *, with_path: bool) -> None:
    if with_path:
        progress.message(f"{result.path}:")
    if result.excluded_from_package:
        excluded = ", ".join(f"`{pass_}`" for pass_ in result.excluded_from_package)
        progress.message(
            f"{excluded}: the graph will use half precision, which is not intended for CPUs: give its backend with --backend"
        )
    for move in result.moves:
        progress.message(str(move))
    for record in result.passes:
        progress.message(
            f"{record.pass_spec}: {record.reason} ({record.nodes_before} -> {record.nodes_after} nodes, {record.seconds:.2f} s)"
        )
        for note in record.notes:
            progress.message(f"    {note}")
