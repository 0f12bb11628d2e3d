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

SECTION = "Measure accuracy"

_CANDIDATE_FORMS = "a package (model.ryzen, model.ryzen#GRAPH@VARIANT), an ONNX file, FILE.py:FUNCTION or recipe:NAME"


@click.command("compare")
@click.argument("candidate")
@click.option("--baseline", required=True, help=f"What to compare with: {_CANDIDATE_FORMS}.")
@shape_options
@data_options
@click.option(
    "--as-given", is_flag=True, help="Run the samples of --data unchanged instead of reshaped to the grid of profiles."
)
@click.option("--max-abs", type=float, help="The maximum absolute difference of any element.")
@click.option("--relative-l2", type=float, help="The maximum relative L2 difference of an output.")
@click.option("--cosine", type=float, help="The minimum cosine similarity of a vector with the baseline's.")
@click.option("--top1", type=float, help="The minimum fraction of rows with the same argmax as the baseline.")
@click.option(
    "--bisect",
    is_flag=True,
    help="If a criterion is not met, find the first pass and node that differ; for two ONNX files, the node.",
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
    """Compare CANDIDATE with a baseline: packages, ONNX files and PyTorch functions in any combination.

    By default the package's files are run over a grid: the min, opt and max shapes of every profile, with equal and with mixed
    rows. Exits with 1 if a criterion is not met, if an output is missing, or if nothing was compared.
    """
    from ryzen_compile.errors import RyzenError
    from ryzen_compile.numerics.candidate_lookup import find_candidate, find_candidates
    from ryzen_compile.numerics.comparison import compare
    from ryzen_compile.numerics.criteria import default_criteria, load_criteria
    from ryzen_compile.report import text as report

    progress = ConsoleProgress(verbosity)
    seed = input_options["seed"]
    criteria = load_criteria(Path(input_options["criteria"])) if input_options["criteria"] else default_criteria()
    criteria = criteria.override(max_abs=max_abs, relative_l2=relative_l2, cosine=cosine, top1=top1)
    baseline_candidate = find_candidate(baseline)
    candidates = find_candidates(candidate)
    _check_outputs(criteria, candidate, candidates, baseline_candidate)
    if bisect:
        _check_bisect(candidate, baseline, source)
    results = []
    first_unmet: tuple[Candidate, Any, Any] | None = None
    for compared in candidates:
        profiles, samples = _profiles_and_samples(compared, baseline_candidate, input_options, as_given=as_given)
        result = compare(
            compared,
            baseline_candidate,
            criteria=criteria,
            profiles=profiles,
            samples=None if as_given else samples,
            inputs=samples if as_given else None,
            seed=seed,
            progress=progress,
        )
        results.append(result)
        if first_unmet is None and not result.met:
            first_unmet = compared, profiles, samples
        if not as_json and verbosity >= 0:
            click.echo(("\n" if len(results) > 1 else "") + report.format_comparison(result))
    divergences = []
    if bisect and first_unmet:
        try:
            divergences.append(
                _run_bisect(*first_unmet, candidate, baseline, source, baseline_candidate, criteria, as_given, seed, progress)
            )
        except RyzenError as error:
            click.echo(f"--bisect found nothing: {error}", err=True)
    if as_json:
        emit({"comparisons": results, "met": _all_met(results), "bisect": divergences})
    for divergence in [] if as_json else divergences:
        click.echo(divergence.message)
    if not _all_met(results):
        return 1
    return 0


def _all_met(results: list[Any]) -> bool:
    return bool(results) and all(result.met for result in results)


def _profiles_and_samples(
    candidate: Candidate, baseline: Candidate, input_options: dict[str, Any], *, as_given: bool
) -> tuple[Any, Any]:
    """Return the requested profiles and samples; () and None stand for those of the candidate and the baseline."""
    from ryzen_compile.data.loading import load_samples
    from ryzen_compile.errors import UsageError
    from ryzen_compile.spec import profile

    shapes = {
        "smallest": input_options["min_shapes"],
        "tuned": input_options["opt_shapes"],
        "largest": input_options["max_shapes"],
    }
    if as_given and not input_options["data"]:
        raise UsageError("--as-given requires the samples of --data, and none are given", hint="add --data SAMPLES")
    interface = candidate.interface or baseline.interface
    if interface is None:
        return (), None
    profiles = profile.resolve_profiles(interface, **shapes) if any(shapes.values()) else ()
    samples = None
    if input_options["data"]:
        samples = list(load_samples(input_options["data"], interface, seed=input_options["seed"]))
    return profiles, samples


def _check_outputs(criteria: Criteria, candidate: str, candidates: Sequence[Candidate], baseline: Candidate) -> None:
    """Raise UsageError for criteria of an output that neither model has; for a package, the outputs of all its graphs count."""
    from ryzen_compile.artifacts.package.read import read_package
    from ryzen_compile.artifacts.package.reference import parse_package_reference

    interfaces = [compared.interface for compared in (*candidates, baseline)]
    if any(compared.graph is not None for compared in candidates):
        interfaces += [graph.interface for graph in read_package(parse_package_reference(candidate).path).manifest.graphs]
    outputs = {spec.name for interface in interfaces if interface is not None for spec in interface.outputs}
    if outputs:
        criteria.check_outputs(outputs)


def _onnx_file(text: str | None) -> Path | None:
    return Path(text) if text and Path(text).suffix == ".onnx" and Path(text).is_file() else None


def _check_bisect(candidate: str, baseline: str, source: str | None) -> None:
    """Raise UsageError if the two cannot be bisected; called before anything is compared."""
    from ryzen_compile.artifacts.package.reference import parse_package_reference
    from ryzen_compile.errors import UsageError
    from ryzen_compile.numerics.package_candidates import find_variant

    if _onnx_file(candidate):
        if not _onnx_file(baseline):
            raise UsageError("--bisect compares an ONNX file only with another ONNX file", hint="give --baseline MODEL.onnx")
        return
    reference = parse_package_reference(candidate)
    if not reference.path.is_dir() and reference.path.suffix != ".ryzen":
        raise UsageError(f"--bisect requires a package or an ONNX file, and `{candidate}` is neither")
    if source is None and not _onnx_file(baseline):
        raise UsageError(
            "--bisect runs the pipeline again on the model that the package was built from", hint="add --source MODEL.onnx"
        )
    if source is not None and not Path(source).is_file():
        raise UsageError(f"there is no file `{source}`", hint="give --source MODEL.onnx")
    find_variant(reference)


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
    """Run the pipeline of a variant again on its source graph, or compare the tensors of two ONNX files."""
    from ryzen_compile import registry
    from ryzen_compile.artifacts.package.read import read_package
    from ryzen_compile.artifacts.package.reference import parse_package_reference
    from ryzen_compile.numerics.bisect import bisect, find_divergence
    from ryzen_compile.pipeline.parser import parse
    from ryzen_compile.pipeline.range_measurement import measure_ranges
    from ryzen_compile.spec.passes import PassContext

    cases: dict[str, Any] = {"samples": None if as_given else samples, "inputs": samples if as_given else None}
    file, other = _onnx_file(candidate_text), _onnx_file(baseline)
    if file and other:
        return find_divergence(file, other, criteria=criteria, profiles=profiles, seed=seed, progress=progress, **cases)
    package = read_package(parse_package_reference(candidate_text).path)
    assert candidate.package_file is not None, "the candidate is of a package"
    graph, variant = package.manifest.variant_at(candidate.package_file)
    return bisect(
        Path(source) if source else Path(baseline),
        parse(",".join(record.pass_spec for record in variant.passes)),
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
