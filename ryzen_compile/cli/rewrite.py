"""Run passes on an ONNX file and write what they leave, without building anything."""

from __future__ import annotations

from typing import Literal

import click

from ryzen_compile.cli.console import Talk, emit, talk_options
from ryzen_compile.cli.wishes import SEED


@click.command("rewrite")
@click.argument("model")
@click.argument("output")
@click.option("-p", "--passes", required=True, help="Passes, as `fold,precision{to=fp16}`.")
@click.option("--backend", default="onnxruntime", show_default=True, help="The backend that the result is for.")
@click.option("--data", metavar="SAMPLES", help="Calibration samples: FILE.npz, FILE.py[:FUNCTION] or recipe:NAME.")
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option("--weights", type=click.Choice(["auto", "inline", "external"]), default="auto", show_default=True)
@talk_options
def command(
    model: str,
    output: str,
    passes: str,
    backend: str,
    data: str | None,
    seed: int,
    weights: Literal["auto", "inline", "external"],
    verbosity: int,
    as_json: bool,
) -> None:
    """Run passes on MODEL and write the graph to OUTPUT; each pass is held to its word on the way.

    Every pass that is named is run: that a CPU gets no half precision holds for packages.
    """
    import dataclasses

    from ryzen_compile import registry
    from ryzen_compile.builder.plans import plan_for, settle
    from ryzen_compile.cli.places import check_output
    from ryzen_compile.contract import Context
    from ryzen_compile.data.named import named
    from ryzen_compile.graph.interface import interface_of
    from ryzen_compile.graph.load import load
    from ryzen_compile.graph.save import save
    from ryzen_compile.plan import spelling
    from ryzen_compile.plan.observe import observe
    from ryzen_compile.plan.runner import holding, run

    talk = Talk(verbosity)
    registry.find_backend(backend)
    check_output(output, source=model)
    graph = load(model)
    planned = plan_for(backend, passes=passes, precision=None, half_source=None)
    asked = dataclasses.replace(planned, passes=spelling.parse("" if passes == "none" else passes), notes=())
    if len(asked.passes) > len(planned.passes):
        left_out = ", ".join(f"`{pass_}`" for pass_ in asked.passes if pass_ not in planned.passes)
        talk.say(f"{left_out}: the graph will hold half precision, which is not for CPUs: name what it is for with --backend")
    facts = registry.facts_of(asked.passes)
    plan, moves = settle(asked, holding(graph, facts))
    for move in moves:
        talk.say(str(move))
    interface = interface_of(graph) if plan.calibrates else None
    samples = list(named(data, interface, seed=seed)) if data and interface else ()
    context = Context(backend=backend, interface=interface, samples=samples, observe=observe, seed=seed, progress=talk)
    steps = run(graph, plan.passes, context, facts)
    save(graph, output, weights=weights)
    if as_json:
        emit({"path": output, "steps": steps})
    else:
        for step in steps:
            talk.say(f"{step.spelling}: {step.because} ({step.nodes_before} -> {step.nodes_after} nodes, {step.seconds:.2f} s)")
            for note in step.notes:
                talk.say(f"    {note}")
