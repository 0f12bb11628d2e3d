"""Run passes on an ONNX file and write what they leave, without building anything."""

from __future__ import annotations

from typing import Literal

import click

from ryzen_compile.cli.console import Talk, emit, talk_options


@click.command("rewrite")
@click.argument("model")
@click.argument("output")
@click.option("-p", "--passes", required=True, help="Passes, as `fold,precision{to=fp16}`.")
@click.option("--backend", default="onnxruntime", show_default=True, help="The backend that the result is for.")
@click.option("--data", metavar="SAMPLES", help="Calibration samples: FILE.npz, FILE.py[:FUNCTION] or recipe:NAME.")
@click.option("--seed", type=int, default=0, show_default=True)
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
    """Run passes on MODEL and write the graph to OUTPUT; each pass is held to its word on the way."""
    from ryzen_compile import registry
    from ryzen_compile.builder.plans import plan_for, settle
    from ryzen_compile.contract import Context
    from ryzen_compile.data.named import named
    from ryzen_compile.graph.interface import interface_of
    from ryzen_compile.graph.load import load
    from ryzen_compile.graph.save import save
    from ryzen_compile.plan.observe import observe
    from ryzen_compile.plan.runner import holding, run

    talk = Talk(verbosity)
    graph = load(model)
    asked = plan_for(backend, passes=passes, precision=None, half_source=None)
    facts = registry.facts_of(asked.passes)
    plan, moves = settle(asked, holding(graph, facts))
    for line in (*plan.notes, *map(str, moves)):
        talk.say(line)
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
