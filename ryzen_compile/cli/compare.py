"""Compare a package, a model or a module with a baseline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ryzen_compile.cli.build_options import data_options, shape_options
from ryzen_compile.cli.console import ConsoleProgress, console_options, emit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ryzen_compile.numerics.candidate import Candidate
    from ryzen_compile.numerics.criteria import Criteria

_CANDIDATE_FORMS = "a package (model.ryzen, model.ryzen#GRAPH@VARIANT), an ONNX file, FILE.py:FUNCTION or recipe:NAME"


@click.command("compare")
@click.argument("candidate")
@click.option("--baseline", required=True, help=f"What to compare with: {_CANDIDATE_FORMS}.")
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
@console_options
def command(
    candidate: str,
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
    **input_options: Any,
) -> int:
    """Compare SUBJECT with a baseline: packages, ONNX files and PyTorch functions in any pairing.

    By default the shipped bytes are run over a grid: the min, opt and max of every profile, with equal and with mixed rows.
    Exits with 1 where a criterion is not met, where an output is missing, and where nothing was compared.
    """
    from ryzen_compile.cli import report
    from ryzen_compile.errors import RyzenError
    from ryzen_compile.numerics.candidate_lookup import find_candidate, find_candidates
    from ryzen_compile.numerics.comparison import compare
    from ryzen_compile.numerics.criteria import default_criteria, load_criteria

    talk = ConsoleProgress(verbosity)
    seed = input_options["seed"]
    criteria = load_criteria(Path(input_options["criteria"])) if input_options["criteria"] else default_criteria()
    criteria = criteria.override(max_abs=max_abs, relative_l2=relative_l2, cosine=cosine, top1=top1)
    against = find_candidate(baseline)
    candidates = find_candidates(candidate)
    _check_outputs(criteria, candidate, candidates, against)
    if bisect:
        _check_bisect(candidate, baseline, source)
    results = []
    part: tuple[Candidate, Any, Any] | None = None
    for one in candidates:
        profiles, feeds = _profiles_and_samples(one, against, input_options, as_given=as_given)
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
            click.echo(("\n" if len(results) > 1 else "") + report.format_comparison(result))
    found = []
    if bisect and part:
        try:
            found.append(_run_bisect(*part, candidate, baseline, source, against, criteria, as_given, seed, talk))
        except RyzenError as error:
            click.echo(f"--bisect found nothing: {error}", err=True)
    if as_json:
        emit({"comparisons": results, "met": _all_met(results), "bisect": found})
    for one in [] if as_json else found:
        click.echo(one.says)
    if not _all_met(results):
        return 1
    return 0


def _all_met(results: list[Any]) -> bool:
    return bool(results) and all(result.met for result in results)


def _profiles_and_samples(
    candidate: Candidate, baseline: Candidate, input_options: dict[str, Any], *, as_given: bool
) -> tuple[Any, Any]:
    """Return the profiles and the samples that the user asked for: () and None stand for what the two bring along."""
    from ryzen_compile.data.loading import load_samples
    from ryzen_compile.errors import UsageError
    from ryzen_compile.spec import profile

    shapes = {
        "smallest": input_options["min_shapes"],
        "tuned": input_options["opt_shapes"],
        "largest": input_options["max_shapes"],
    }
    if as_given and not input_options["data"]:
        raise UsageError("--as-given runs the samples of --data, and there are none", hint="add --data SAMPLES")
    interface = candidate.interface or baseline.interface
    if interface is None:
        return (), None
    profiles = profile.resolve_profiles(interface, **shapes) if any(shapes.values()) else ()
    return profiles, list(load_samples(input_options["data"], interface, seed=input_options["seed"])) if input_options[
        "data"
    ] else None


def _check_outputs(criteria: Criteria, candidate: str, candidates: Sequence[Candidate], baseline: Candidate) -> None:
    """Refuse limits for an output that no graph of the package and neither model has; a criteria file may serve all graphs."""
    from ryzen_compile.artifacts.package.read import read_package
    from ryzen_compile.numerics.candidate_lookup import split_package_reference

    interfaces = [one.interface for one in (*candidates, baseline)]
    if any(one.graph is not None for one in candidates):
        interfaces += [graph.interface for graph in read_package(split_package_reference(candidate)[0]).manifest.graphs]
    known = {spec.name for one in interfaces if one is not None for spec in one.outputs}
    if known:
        criteria.check_outputs(known)


def _onnx_file(text: str | None) -> Path | None:
    return Path(text) if text and Path(text).suffix == ".onnx" and Path(text).is_file() else None


def _check_bisect(candidate: str, baseline: str, source: str | None) -> None:
    """Raise UsageError where there is nothing to bisect: before anything is compared."""
    from ryzen_compile.errors import UsageError
    from ryzen_compile.numerics.candidate_lookup import split_package_reference
    from ryzen_compile.numerics.package_candidates import find_variant

    if _onnx_file(candidate):
        if not _onnx_file(baseline):
            raise UsageError("--bisect measures an ONNX file against another one", hint="give --baseline MODEL.onnx")
        return
    path, graph, which = split_package_reference(candidate)
    if not path.is_dir() and path.suffix != ".ryzen":
        raise UsageError(f"--bisect takes a package or an ONNX file, and `{candidate}` is neither")
    if source is None and not _onnx_file(baseline):
        raise UsageError(
            "--bisect replays the plan on the model that the package was built from", hint="add --source MODEL.onnx"
        )
    if source is not None and not Path(source).is_file():
        raise UsageError(f"there is no file `{source}`", hint="give --source MODEL.onnx")
    find_variant(path, graph=graph, selector=which)


def _run_bisect(
    candidate: Candidate,
    profiles: Any,
    samples: Any,
    candidate_text: str,
    baseline: str,
    source: str | None,
    baseline_candidate: Candidate,
    criteria: Criteria,
    as_given: bool,
    seed: int,
    progress: ConsoleProgress,
) -> Any:
    """Replay the plan of the variant `one` on the graph that it was built from, or measure two ONNX files by their tensors."""
    from ryzen_compile import registry
    from ryzen_compile.artifacts.package.read import read_package
    from ryzen_compile.numerics.bisect import bisect, find_divergence
    from ryzen_compile.numerics.candidate_lookup import split_package_reference
    from ryzen_compile.pipeline.parser import parse
    from ryzen_compile.pipeline.range_measurement import measure_ranges
    from ryzen_compile.spec.passes import PassContext

    cases: dict[str, Any] = {"samples": None if as_given else samples, "inputs": samples if as_given else None}
    file, other = _onnx_file(candidate_text), _onnx_file(baseline)
    if file and other:
        return find_divergence(file, other, criteria=criteria, profiles=profiles, seed=seed, progress=progress, **cases)
    package = read_package(split_package_reference(candidate_text)[0])
    built = {(engine.graph, engine.variant) for engine in package.manifest.engines if engine.path == candidate.package_file}
    graph, variant = next(
        (graph, variant)
        for graph in package.manifest.graphs
        for variant in graph.variants
        if variant.path == candidate.package_file or (graph.name, variant.name) in built
    )
    return bisect(
        Path(source) if source else Path(baseline),
        parse(",".join(step.pass_spec for step in variant.passes)),
        baseline=baseline_candidate,
        context=PassContext(
            backend=variant.backend, interface=graph.interface, measure_ranges=measure_ranges, seed=seed, progress=progress
        ),
        properties=registry.properties(),
        criteria=criteria,
        profiles=profiles or graph.profiles,
        baseline_file=other,
        packaged_graph=package.path / variant.path,
        progress=progress,
        **cases,
    )
