"""Run passes on an ONNX file and write the resulting graph, without building a package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import click

from ryzen_compile.cli.build_options import SAMPLES_HELP, SEED, limit_options
from ryzen_compile.cli.completion import complete_passes
from ryzen_compile.cli.console import ConsoleProgress, console_options, emit
from ryzen_compile.errors import UsageError

if TYPE_CHECKING:
    from ryzen_compile.builder.rewrite import RewriteResult

SECTION = "Compile"


@click.command("rewrite")
@click.argument("model")
@click.argument("output")
@click.option("-p", "--passes", required=True, shell_complete=complete_passes, help="Passes, as in `fold,precision{to=fp16}`.")
@click.option("--backend", default="onnxruntime", show_default=True, help="The backend that the result is intended for.")
@click.option(
    "--steps",
    metavar="1,any",
    help="Write one graph per step width of a decoder, in tokens or `any`, to the folder OUTPUT.",
)
@click.option("--data", metavar="SAMPLES", help=f"Calibration samples: {SAMPLES_HELP}.")
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option("--weights", type=click.Choice(["auto", "inline", "external"]), default="auto", show_default=True)
@limit_options
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
    memory_limit_bytes: int | None,
    time_limit_seconds: float | None,
    verbosity: int,
    as_json: bool,
) -> None:
    """Run passes on MODEL, verify their declared properties, and write the graph to OUTPUT.

    Every given pass is run, including conversions to half precision that a package leaves out of its portable variant. With
    --steps, OUTPUT is a folder of graphs over the same states and weights; `build` makes one package of it, and its engine
    selects the graph for the width of each step.
    """
    from ryzen_compile import api

    progress = ConsoleProgress(verbosity)
    if steps is None:
        results: tuple[RewriteResult, ...] = (
            api.rewrite(
                model,
                output,
                passes=passes,
                backend=backend,
                data=data,
                seed=seed,
                weights=weights,
                memory_limit_bytes=memory_limit_bytes,
                time_limit_seconds=time_limit_seconds,
                progress=progress,
            ),
        )
    elif weights == "auto":
        results = api.rewrite_steps(
            model,
            output,
            passes=passes,
            steps=steps,
            backend=backend,
            data=data,
            seed=seed,
            memory_limit_bytes=memory_limit_bytes,
            time_limit_seconds=time_limit_seconds,
            progress=progress,
        )
    else:
        raise UsageError(
            f"--weights {weights}: the graphs of --steps share one weight store", hint="leave one of the two options out"
        )
    if as_json:
        emit({"graphs": results})
