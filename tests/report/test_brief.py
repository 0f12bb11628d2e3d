"""Tests of the short reports: a verdict, a line for each part that is in order, and in full what is not."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from support import sample_package, tiny_models

import ryzen_compile as rc
from ryzen_compile.artifacts.package.diagnostics import accuracy_warning
from ryzen_compile.artifacts.package.manifest import Estimate, EvaluationRecord, MetricRecord, MetricResult, Provenance
from ryzen_compile.artifacts.package.metric_text import format_worst
from ryzen_compile.cli.main import run
from ryzen_compile.report import text as report


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> rc.Package:
    folder = tmp_path_factory.mktemp("brief")
    return rc.build(tiny_models.write(folder / "small.onnx"), gpu="cpu", cache=False)


def changed(package: rc.Package, **variant_fields: object) -> rc.Package:
    """Return the package with fields of its only variant replaced."""
    (graph,) = package.manifest.graphs
    variant = msgspec.structs.replace(graph.variants[0], **variant_fields)
    graph = msgspec.structs.replace(graph, variants=(variant,))
    return rc.Package(package.path, msgspec.structs.replace(package.manifest, graphs=(graph,)), package.inode_id)


def test_a_package_that_is_in_order_has_a_verdict_and_a_line_for_each_part(package: rc.Package) -> None:
    verdict, graph, shapes, variant, following = report.format_package_brief(package).splitlines()
    assert verdict.startswith(f"MET: {package.path}, ")
    assert graph == "graph model, from small.onnx: x: float32[batch, 16] -> y: float32[batch, 16]"
    assert shapes.startswith("  shapes min x:1x16")
    assert "runs on the CPU: meets the defaults of ryzen-compile in 3 cases, worst max_abs " in variant
    assert following.startswith(f"next: ryzen-compile run {package.path}; ")


def test_a_variant_that_does_not_meet_its_criteria_is_reported_in_full(package: rc.Package) -> None:
    (accuracy,) = package.manifest.graphs[0].variants[0].accuracy
    metrics = (msgspec.structs.replace(accuracy.metrics[0], met=False, worst=3.5), *accuracy.metrics[1:])
    text = report.format_package_brief(
        changed(package, accuracy=(msgspec.structs.replace(accuracy, met=False, metrics=metrics),))
    )
    assert text.startswith("NOT MET: ")
    assert "DOES NOT MEET" in text
    assert "3.5" in text


def test_an_engine_that_does_not_meet_its_criteria_is_in_the_verdict(package: rc.Package) -> None:
    (engine,) = sample_package.manifest().engines
    (file, *_) = package.manifest.files
    provenance = Provenance(level="compared", machine="a GPU", message="strict.toml", met=True, timestamp="now")
    for met in (True, False):
        record = msgspec.structs.replace(engine, path=file.path, provenance=(msgspec.structs.replace(provenance, met=met),))
        text = report.format_package_brief(package, msgspec.structs.replace(package.manifest, engines=(record,)))
        assert text.startswith("MET: " if met else "NOT MET: ")
        assert ("DOES NOT MEET strict.toml" in text) != met


def test_an_evaluation_that_is_not_met_is_in_the_verdict(package: rc.Package) -> None:
    metric = MetricResult(
        name="kl", group="", count=1, baseline=None, method=None, candidate=Estimate(value=3.0), required="<= 0.1", met=False
    )
    names = ("candidate", "baseline", "method", "machine", "data", "step_mode", "timestamp")
    evaluation = EvaluationRecord(**dict.fromkeys(names, "a name"), results=(metric,), met=False, seconds=1.0)
    text = report.format_package_brief(changed(package, evaluations=(evaluation,)))
    assert text.startswith("NOT MET: ")
    assert "NOT MET: kl <= 0.1" in text
    manifest = changed(package, evaluations=(evaluation,)).manifest
    warning = accuracy_warning(manifest, manifest.graphs[0].variants[0].path)
    assert warning is not None
    assert warning.message == "DOES NOT MEET kl <= 0.1 against a name"
    assert accuracy_warning(package.manifest, manifest.graphs[0].variants[0].path) is None


def test_a_variant_that_was_not_compared_has_the_reason(package: rc.Package) -> None:
    text = report.format_package_brief(changed(package, accuracy=(), not_compared_reason="it hangs"))
    assert text.startswith("NOT COMPARED: ")
    assert "not compared: it hangs" in text


def test_several_comparisons_of_a_variant_are_told_apart_by_their_baselines(package: rc.Package) -> None:
    (accuracy,) = package.manifest.graphs[0].variants[0].accuracy
    other = msgspec.structs.replace(accuracy, baseline="module.py:make")
    text = report.format_package_brief(changed(package, accuracy=(accuracy, other)))
    assert f"in 3 cases against {accuracy.baseline}, worst max_abs " in text
    assert "; meets the defaults of ryzen-compile in 3 cases against module.py:make, worst max_abs " in text


def test_notes_and_parts_that_were_not_run_take_a_line_each(package: rc.Package) -> None:
    (accuracy,) = package.manifest.graphs[0].variants[0].accuracy
    accuracy = msgspec.structs.replace(accuracy, notes=("a note",), not_run=("the branch of If `x`",))
    lines = report.format_package_brief(changed(package, accuracy=(accuracy, accuracy))).splitlines()
    assert lines[-3:-1] == ["      note: a note", "      not compared: the branch of If `x`: no case ran it"]
    assert len(lines) == 7


def test_many_branches_that_were_not_run_are_counted(package: rc.Package) -> None:
    (accuracy,) = package.manifest.graphs[0].variants[0].accuracy
    accuracy = msgspec.structs.replace(accuracy, not_run=tuple(f"branch {number}" for number in range(9)))
    lines = report.format_package_brief(changed(package, accuracy=(accuracy,))).splitlines()
    assert [line.strip() for line in lines if "branch" in line] == [
        *(f"not compared: branch {number}: no case ran it" for number in range(3)),
        "and 6 further branches: -v lists them",
    ]


def metric(name: str, worst: float, required: str | None) -> MetricRecord:
    return MetricRecord(output="y", name=name, worst=worst, required=required, met=True, case="a case")


def test_the_worst_values_are_of_metrics_with_a_criterion() -> None:
    metrics = [
        metric("max_abs", 0.25, "<= 1"),
        metric("max_abs", 0.5, "<= 1"),
        metric("max_abs", 0.125, "<= 1"),
        metric("cosine", 0.75, ">= 0.5"),
        metric("cosine", 0.875, ">= 0.5"),
        metric("relative_l2", 0.5, None),
        metric("relative_l2", 0.25, None),
        metric("batch_invariance_cosine", 0.5, ">= 0.5"),
    ]
    assert format_worst(metrics) == "worst max_abs 0.5 (<= 1), cosine 0.75 (>= 0.5)"
    assert format_worst([metric("relative_l2", 0.5, None)]) == ""


def test_without_criteria_no_worst_value_is_announced(package: rc.Package) -> None:
    result = rc.compare(package, str(package.path.with_suffix(".onnx")))
    (comparison,) = result.comparisons
    metrics = tuple(msgspec.structs.replace(item, required=None) for item in comparison.accuracy.metrics)
    comparison = msgspec.structs.replace(comparison, accuracy=msgspec.structs.replace(comparison.accuracy, metrics=metrics))
    assert report.format_comparisons([comparison], brief=True).splitlines()[1].endswith(" s")
    assert "worst" not in msgspec.structs.replace(result, comparisons=(comparison,))._repr_html_()
    assert "worst" not in report.format_package_brief(changed(package, accuracy=(comparison.accuracy,)))


def test_reports_in_full_are_separated_by_a_blank_line(package: rc.Package) -> None:
    (met,) = rc.compare(package, str(package.path.with_suffix(".onnx"))).comparisons
    unmet = msgspec.structs.replace(met, accuracy=msgspec.structs.replace(met.accuracy, met=False))
    short = report.format_comparisons([met], brief=True)
    assert report.format_comparisons([met, met], brief=True) == f"{short}\n{short}"
    assert report.format_comparisons([met, unmet, met], brief=True) == (
        f"{short}\n\n{report.format_comparison(unmet)}\n\n{short}"
    )
    full = report.format_comparison(met)
    assert report.format_comparisons([met, met], brief=False) == f"{full}\n\n{full}"


def test_the_next_command_names_a_graph_where_a_package_has_several(
    package: rc.Package, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = {name: tiny_models.write(tmp_path / f"{name}.onnx", seed=seed) for seed, name in enumerate(("left", "right"))}
    several = rc.build(sources, tmp_path / "m.ryzen", gpu="cpu", compare=False, cache=False)
    for reference, graph in ((str(several.path), "left"), (f"{several.path}#right", "right")):
        assert run(["inspect", reference]) == 0
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("next: "))
        command = line.removeprefix("next: ").partition(";")[0]
        assert command == f"ryzen-compile run {several.path}#{graph}"
        assert run(command.split()[1:]) == 0
        capsys.readouterr()


def test_the_next_command_of_a_package_of_text_that_is_no_decoder_is_run(package: rc.Package) -> None:
    manifest = msgspec.structs.replace(package.manifest, text_files=("text/tokenizer.json",))
    text = report.format_package_brief(rc.Package(package.path, manifest, package.inode_id))
    assert f"next: ryzen-compile run {package.path};" in text


def test_commands_print_the_short_report_and_with_v_all_measures(
    package: rc.Package, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(Path(package.path).with_suffix(".onnx"))
    for arguments in (["inspect", str(package.path)], ["compare", str(package.path), "--baseline", source]):
        assert run(arguments) == 0
        short = capsys.readouterr().out
        assert run([*arguments, "-v"]) == 0
        full = capsys.readouterr().out
        assert short.startswith("MET: ")
        assert "batch_invariance_cosine" not in short
        assert "batch_invariance_cosine" in full
