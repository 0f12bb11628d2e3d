"""Run passes on an ONNX file and write what they leave, without building anything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import click

from ryzen_compile.cli.build_options import SEED
from ryzen_compile.cli.console import Talk, emit, talk_options
from ryzen_compile.errors import UsageError

if TYPE_CHECKING:
    from ryzen_compile.builder.rewrite import Rewritten


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
@talk_options
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
    from ryzen_compile.builder.rewrite import Rewriting, read_widths, rewrite, rewrite_steps
    from ryzen_compile.cli.output_paths import check_output

    talk = Talk(verbosity)
    rewriting = Rewriting(passes=passes, backend=backend, data=data, seed=seed)
    if steps is None:
        check_output(output, source=model)
        done: tuple[Rewritten, ...] = (rewrite(model, output, rewriting, weights=weights, progress=talk),)
    elif weights == "auto":
        done = rewrite_steps(model, output, rewriting, read_widths(steps), progress=talk)
    else:
        raise UsageError(f"--weights {weights}: the graphs of --steps share a store", hint="leave one of the two out")
    for one in done:
        if as_json:
            emit({"path": one.path, "steps": one.steps})
        else:
            _tell(talk, one, several=len(done) > 1)


def _tell(talk: Talk, one: Rewritten, *, several: bool) -> None:
    if several:
        talk.say(f"{one.path}:")
    if one.left_out:
        left_out = ", ".join(f"`{pass_}`" for pass_ in one.left_out)
        talk.say(f"{left_out}: the graph will hold half precision, which is not for CPUs: name what it is for with --backend")
    for move in one.moves:
        talk.say(str(move))
    for step in one.steps:
        talk.say(f"{step.spelling}: {step.because} ({step.nodes_before} -> {step.nodes_after} nodes, {step.seconds:.2f} s)")
        for note in step.notes:
            talk.say(f"    {note}")
