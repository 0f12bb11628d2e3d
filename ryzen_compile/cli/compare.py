"""Compare a package, a model or a module with a baseline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ryzen_compile.cli.build_options import data_options, shape_options
from ryzen_compile.cli.console import Talk, emit, talk_options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ryzen_compile.numerics.candidate import Subject
    from ryzen_compile.numerics.criteria import Criteria

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
@click.option(
    "--bisect", is_flag=True, help="Where they part, name the first pass and the first node; of two ONNX files the first node."
)
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
    from ryzen_compile.errors import RyzenError
    from ryzen_compile.numerics.candidates import find, find_one
    from ryzen_compile.numerics.comparison import compare
    from ryzen_compile.numerics.criteria import defaults, load

    talk = Talk(verbosity)
    seed = wish["seed"]
    criteria = load(Path(wish["criteria"])) if wish["criteria"] else defaults()
    criteria = criteria.override(max_abs=max_abs, relative_l2=relative_l2, cosine=cosine, top1=top1)
    against = find_one(baseline)
    subjects = find(subject)
    _check_outputs(criteria, subject, subjects, against)
    if bisect:
        _check_bisect(subject, baseline, source)
    results = []
    part: tuple[Subject, Any, Any] | None = None
    for one in subjects:
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
        if part is None and not result.met:
            part = one, profiles, feeds
        if not as_json and verbosity >= 0:
            click.echo(("\n" if len(results) > 1 else "") + report.of_comparison(result))
    found = []
    if bisect and part:
        try:
            found.append(_bisected(*part, subject, baseline, source, against, criteria, as_given, seed, talk))
        except RyzenError as error:
            click.echo(f"--bisect found nothing: {error}", err=True)
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
    from ryzen_compile.data.loading import named
    from ryzen_compile.errors import UsageError
    from ryzen_compile.spec import profile

    shapes = {"smallest": wish["min_shapes"], "tuned": wish["opt_shapes"], "largest": wish["max_shapes"]}
    if as_given and not wish["data"]:
        raise UsageError("--as-given runs the samples of --data, and there are none", hint="add --data SAMPLES")
    interface = one.interface or against.interface
    if interface is None:
        return (), None
    profiles = profile.resolve(interface, **shapes) if any(shapes.values()) else ()
    return profiles, list(named(wish["data"], interface, seed=wish["seed"])) if wish["data"] else None


def _check_outputs(criteria: Criteria, subject: str, subjects: Sequence[Subject], against: Subject) -> None:
    """Refuse limits for an output that no graph of the package and neither model has; a criteria file may serve all graphs."""
    from ryzen_compile.artifacts.package.read import read
    from ryzen_compile.numerics.candidates import split

    interfaces = [one.interface for one in (*subjects, against)]
    if any(one.graph is not None for one in subjects):
        interfaces += [graph.interface for graph in read(split(subject)[0]).manifest.graphs]
    known = {spec.name for one in interfaces if one is not None for spec in one.outputs}
    if known:
        criteria.check_outputs(known)


def _onnx_file(text: str | None) -> Path | None:
    return Path(text) if text and Path(text).suffix == ".onnx" and Path(text).is_file() else None


def _check_bisect(subject: str, baseline: str, source: str | None) -> None:
    """Raise UsageError where there is nothing to bisect: before anything is compared."""
    from ryzen_compile.errors import UsageError
    from ryzen_compile.numerics.candidates import split
    from ryzen_compile.numerics.package_candidates import variant_of

    if _onnx_file(subject):
        if not _onnx_file(baseline):
            raise UsageError("--bisect measures an ONNX file against another one", hint="give --baseline MODEL.onnx")
        return
    path, graph, which = split(subject)
    if not path.is_dir() and path.suffix != ".ryzen":
        raise UsageError(f"--bisect takes a package or an ONNX file, and `{subject}` is neither")
    if source is None and not _onnx_file(baseline):
        raise UsageError(
            "--bisect replays the plan on the model that the package was built from", hint="add --source MODEL.onnx"
        )
    if source is not None and not Path(source).is_file():
        raise UsageError(f"there is no file `{source}`", hint="give --source MODEL.onnx")
    variant_of(path, graph=graph, which=which)


def _bisected(
    one: Subject,
    profiles: Any,
    feeds: Any,
    subject: str,
    baseline: str,
    source: str | None,
    against: Subject,
    criteria: Criteria,
    as_given: bool,
    seed: int,
    talk: Talk,
) -> Any:
    """Replay the plan of the variant `one` on the graph that it was built from, or measure two ONNX files by their tensors."""
    from ryzen_compile import registry
    from ryzen_compile.artifacts.package.read import read
    from ryzen_compile.numerics.bisect import bisect, part
    from ryzen_compile.numerics.candidates import split
    from ryzen_compile.pipeline.parser import parse
    from ryzen_compile.pipeline.range_measurement import observe
    from ryzen_compile.spec.passes import Context

    cases: dict[str, Any] = {"samples": None if as_given else feeds, "inputs": feeds if as_given else None}
    file, other = _onnx_file(subject), _onnx_file(baseline)
    if file and other:
        return part(file, other, criteria=criteria, profiles=profiles, seed=seed, progress=talk, **cases)
    package = read(split(subject)[0])
    built = {(engine.graph, engine.variant) for engine in package.manifest.engines if engine.path == one.part}
    graph, variant = next(
        (graph, variant)
        for graph in package.manifest.graphs
        for variant in graph.variants
        if variant.path == one.part or (graph.name, variant.name) in built
    )
    return bisect(
        Path(source) if source else Path(baseline),
        parse(",".join(step.spelling for step in variant.steps)),
        baseline=against,
        context=Context(backend=variant.backend, interface=graph.interface, observe=observe, seed=seed, progress=talk),
        facts=registry.facts(),
        criteria=criteria,
        profiles=profiles or graph.profiles,
        baseline_file=other,
        shipped=package.path / variant.path,
        progress=talk,
        **cases,
    )
