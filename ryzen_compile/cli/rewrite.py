"""Run passes on an ONNX file and write what they leave, without building anything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import click

from ryzen_compile.cli.build_options import SEED
from ryzen_compile.cli.console import ConsoleProgress, console_options, emit
from ryzen_compile.errors import UsageError

if TYPE_CHECKING:
    from ryzen_compile.builder.rewrite import RewriteResult


@click.command("rewrite")
@click.argument("model")
@click.argument("output")
@click.option("-p", "--passes", required=True, help="Passes, as `fold,precision{to=fp16}`.")
@click.option("--backend", default="onnxruntime", show_default=True, help="The backend that the result is for.")
@click.option(
    "--steps",
    metavar="1,any",
    help="Write a graph for each width of steps of a decoder, in tokens or `any`, to the folder OUTPUT.",
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
    """Run passes on MODEL and write the graph to OUTPUT; each pass is held to its word on the way.

    Every pass that is named is run: that a CPU gets no half precision holds for packages. With --steps OUTPUT is a folder of
    graphs over the same states and weights; `build` makes one package of it, and an engine of that runs each step by the
    graph that suits it.
    """
    from ryzen_compile.builder.rewrite import RewriteConfig, parse_step_widths, rewrite, rewrite_steps
    from ryzen_compile.cli.output_paths import check_output

    talk = ConsoleProgress(verbosity)
    rewriting = RewriteConfig(passes=passes, backend=backend, data=data, seed=seed)
    if steps is None:
        check_output(output, source=model)
        done: tuple[RewriteResult, ...] = (rewrite(model, output, rewriting, weights=weights, progress=talk),)
    elif weights == "auto":
        done = rewrite_steps(model, output, rewriting, parse_step_widths(steps), progress=talk)
    else:
        raise UsageError(f"--weights {weights}: the graphs of --steps share a store", hint="leave one of the two out")
    for one in done:
        if as_json:
            emit({"path": one.path, "passes": one.passes})
        else:
            _print_result(talk, one, with_path=len(done) > 1)


def _print_result(progress: ConsoleProgress, result: RewriteResult, *, with_path: bool) -> None:
    if with_path:
        progress.message(f"{result.path}:")
    if result.excluded_from_package:
        left_out = ", ".join(f"`{pass_}`" for pass_ in result.excluded_from_package)
        progress.message(
            f"{left_out}: the graph will hold half precision, which is not for CPUs: name what it is for with --backend"
        )
    for move in result.moves:
        progress.message(str(move))
    for step in result.passes:
        progress.message(
            f"{step.pass_spec}: {step.reason} ({step.nodes_before} -> {step.nodes_after} nodes, {step.seconds:.2f} s)"
        )
        for note in step.notes:
            progress.message(f"    {note}")
