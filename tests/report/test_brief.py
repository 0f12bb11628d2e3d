"""Tests of the short reports: a verdict, a line for each part that is in order, and in full what is not."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from support import tiny_models

import ryzen_compile as rc
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


def test_a_variant_that_was_not_compared_has_the_reason(package: rc.Package) -> None:
    text = report.format_package_brief(changed(package, accuracy=(), not_compared_reason="it hangs"))
    assert text.startswith("NOT COMPARED: ")
    assert "not compared: it hangs" in text


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
