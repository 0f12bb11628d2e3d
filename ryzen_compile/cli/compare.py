"""Compare a package, a model or a module with a baseline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ryzen_compile.cli.console import Talk, emit, talk_options
from ryzen_compile.cli.wishes import data_options, shape_options

if TYPE_CHECKING:
    from ryzen_compile.compare.criteria import Criteria
    from ryzen_compile.compare.subject import Subject

_SUBJECT = "a package (model.ryzen, model.ryzen#GRAPH@VARIANT), an ONNX file, FILE.py:FUNCTION or recipe:NAME"


@click.command("compare")
@click.argument("subject")
@click.option("--baseline", required=True, help=f"What to compare with: {_SUBJECT}.")
@shape_options
@data_options
@click.option("--as-given", is_flag=True, help="Run the samples of --data as they are, not brought to the grid of profiles.")
@click.option("--max-abs", type=float, help="The most that any element may differ by.")
@click.option("--relative-l2", type=float, help="The most that an output may differ by, in the L2 norm.")
@click.option("--cosine", type=float, help="The least cosine of a vector with the baseline's.")
@click.option("--top1", type=float, help="The least share of rows that choose as the baseline does.")
@click.option("--bisect", is_flag=True, help="Where they part, name the first pass and the first node.")
@click.option("--source", metavar="FILE", help="The ONNX file that a package was built from, for --bisect [the baseline].")
@talk_options
def command(
    subject: str,
    baseline: str,
    as_given: bool,
    max_abs: float | None,
    relative_l2: float | None,
    cosine: float | None,
    top1: float | None,
    bisect: bool,
    source: str | None,
    verbosity: int,
    as_json: bool,
    **wish: Any,
) -> int:
    """Compare SUBJECT with a baseline: packages, ONNX files and PyTorch functions in any pairing.

    By default the shipped bytes are run over a grid: the min, opt and max of every profile, with equal and with mixed rows.
    Exits with 1 where a criterion is not met, where an output is missing, and where nothing was compared.
    """
    from ryzen_compile.cli import report
    from ryzen_compile.compare.criteria import defaults, load
    from ryzen_compile.compare.run import compare
    from ryzen_compile.compare.subjects import find, find_one

    talk = Talk(verbosity)
    seed = wish["seed"]
    criteria = load(Path(wish["criteria"])) if wish["criteria"] else defaults()
    criteria = criteria.override(max_abs=max_abs, relative_l2=relative_l2, cosine=cosine, top1=top1)
    against = find_one(baseline)
    results = []
    for one in find(subject):
        profiles, feeds = _cases(one, against, wish, as_given=as_given)
        result = compare(
            one,
            against,
            criteria=criteria,
            profiles=profiles,
            samples=None if as_given else feeds,
            inputs=feeds if as_given else None,
            seed=seed,
            progress=talk,
        )
        results.append(result)
        if not as_json and verbosity >= 0:
            click.echo(("\n" if len(results) > 1 else "") + report.of_comparison(result))
    found = [_bisected(subject, baseline, source, against, criteria, seed, talk)] if bisect and not _met(results) else []
    if as_json:
        emit({"comparisons": results, "met": _met(results), "bisect": found})
    for one in [] if as_json else found:
        click.echo(one.says)
    if not _met(results):
        return 1
    return 0


def _met(results: list[Any]) -> bool:
    return bool(results) and all(result.met for result in results)


def _cases(one: Subject, against: Subject, wish: dict[str, Any], *, as_given: bool) -> tuple[Any, Any]:
    """Return the profiles and the samples that the user asked for: () and None stand for what the two bring along."""
    from ryzen_compile import profile
    from ryzen_compile.data.named import named
    from ryzen_compile.errors import UsageError

    shapes = {"smallest": wish["min_shapes"], "tuned": wish["opt_shapes"], "largest": wish["max_shapes"]}
    if as_given and not wish["data"]:
        raise UsageError("--as-given runs the samples of --data, and there are none", hint="add --data SAMPLES")
    interface = one.interface or against.interface
    if interface is None:
        return (), None
    profiles = profile.resolve(interface, **shapes) if any(shapes.values()) else ()
    return profiles, list(named(wish["data"], interface, seed=wish["seed"])) if wish["data"] else None


def _bisected(
    subject: str, baseline: str, source: str | None, against: Subject, criteria: Criteria, seed: int, talk: Talk
) -> Any:
    """Replay the plan of the package on the graph that it was built from, and name where the two part."""
    from ryzen_compile import registry
    from ryzen_compile.compare.bisect import bisect
    from ryzen_compile.compare.packages import variant_of
    from ryzen_compile.compare.subjects import split
    from ryzen_compile.contract import Context
    from ryzen_compile.errors import UsageError
    from ryzen_compile.plan.observe import observe
    from ryzen_compile.plan.spelling import parse

    file = source or (baseline if Path(baseline).suffix == ".onnx" else None)
    if file is None:
        raise UsageError(
            "--bisect replays the plan on the model that the package was built from", hint="add --source MODEL.onnx"
        )
    path, graph_name, which = split(subject)
    graph, variant = variant_of(path, graph=graph_name, which=which)
    return bisect(
        Path(file),
        parse(",".join(step.spelling for step in variant.steps)),
        baseline=against,
        context=Context(backend=variant.backend, interface=graph.interface, observe=observe, seed=seed, progress=talk),
        facts=registry.facts(),
        criteria=criteria,
        profiles=graph.profiles,
        progress=talk,
    )
