"""Verification of a package: which graph is compared with which baseline, and what is recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support import sample_package, tiny_models

from ryzen_compile.artifacts.package.diagnostics import accuracy_warning
from ryzen_compile.artifacts.package.read import read_package
from ryzen_compile.cli.main import run
from ryzen_compile.errors import UsageError
from ryzen_compile.numerics.comparison import compare
from ryzen_compile.numerics.criteria import default_criteria
from ryzen_compile.numerics.onnx_candidates import onnx_candidate
from ryzen_compile.numerics.verify import _with_provenance, parse_baselines, verify


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with packages of one and of two graphs, built for the CPU, and their source models."""
    folder = tmp_path_factory.mktemp("verify")
    a, b = tiny_models.write(folder / "a.onnx"), tiny_models.write(folder / "b.onnx", seed=1)
    for arguments in ([str(a), "-o", str(folder / "one.ryzen")], [f"a={a}", f"b={b}", "-o", str(folder / "two.ryzen")]):
        assert run(["build", *arguments, "--gpu", "cpu", "--cache", str(folder / "cache"), "-q"]) == 0
    return folder


def verify_results(package: Path, baseline: str | dict[str, str] | None) -> dict[str, tuple[str, bool]]:
    """Verify a package and return the baseline and whether the criteria are met, by graph."""
    results = verify(package, baseline=baseline).comparisons
    return {
        result.candidate.rpartition("@")[0].rpartition("#")[2]: (Path(result.baseline).name, result.met) for result in results
    }


def accuracy_records(package: Path) -> dict[str, list[Any]]:
    graphs = json.loads((package / "manifest.json").read_text())["graphs"]
    return {graph["name"]: [record for variant in graph["variants"] for record in variant["accuracy"]] for graph in graphs}


def test_each_graph_is_compared_with_its_own_baseline(folder: Path) -> None:
    package = folder / "two.ryzen"
    before = accuracy_records(package)
    baselines = {name: str(folder / f"{name}.onnx") for name in "ab"}
    assert verify_results(package, baselines) == {"a": ("a.onnx", True), "b": ("b.onnx", True)}
    after = accuracy_records(package)
    for name in "ab":
        assert after[name][-1]["baseline"].startswith(f"{name}.onnx")
        assert after[name][-1]["met"]
        assert after[name][-1] not in before[name]


def test_a_result_replaces_the_previous_one_of_the_same_comparison(folder: Path, tmp_path: Path) -> None:
    package = tmp_path / "model.ryzen"
    shutil.copytree(folder / "one.ryzen", package)
    baseline = tmp_path / "baseline.onnx"
    statuses = []
    for seed in (1, 0):
        tiny_models.write(baseline, seed=seed)
        ((_, met),) = verify_results(package, str(baseline)).values()
        (records,) = accuracy_records(package).values()
        matching = [record for record in records if record["baseline"].startswith("baseline.onnx")]
        manifest = read_package(package).manifest
        (path,) = {variant.path for graph in manifest.graphs for variant in graph.variants}
        statuses.append((met, [record["met"] for record in matching], accuracy_warning(manifest, path) is None))
    assert statuses == [(False, [False], False), (True, [True], True)]
    verify_results(package, str(folder / "b.onnx"))
    (records,) = accuracy_records(package).values()
    assert [record["met"] for record in records if record["baseline"].startswith(("baseline.onnx", "b.onnx"))] == [True, False]


def test_the_provenance_of_an_engine_has_the_latest_result_of_each_comparison(tmp_path: Path) -> None:
    candidate = onnx_candidate(tiny_models.write(tmp_path / "a.onnx"))
    met, unmet = (
        compare(candidate, onnx_candidate(tiny_models.write(tmp_path / "b.onnx", seed=seed)), criteria=default_criteria())
        for seed in (0, 1)
    )
    manifest = sample_package.manifest()
    engine = manifest.engines[0]
    for result in (unmet, met, unmet):
        engine = _with_provenance(engine, [result])
        (record,) = engine.provenance
        assert (record.level, record.met, record.timestamp) == ("compared", result.met, result.accuracy.timestamp)
        assert record.message == f"the defaults of ryzen-compile against {result.accuracy.baseline}"
        warning = accuracy_warning(msgspec.structs.replace(manifest, engines=(engine,)), engine.path)
        assert (warning is None) == result.met
        assert result.met or record.message in str(warning)


def test_a_graph_without_a_baseline_is_not_compared_with_that_of_another(folder: Path) -> None:
    package = folder / "two.ryzen"
    before = accuracy_records(package)
    assert verify_results(package, {"a": str(folder / "a.onnx")}) == {"a": ("a.onnx", True)}
    assert accuracy_records(package)["b"] == before["b"]


def test_one_baseline_for_several_graphs_is_rejected_and_nothing_is_recorded(folder: Path) -> None:
    package = folder / "two.ryzen"
    before = (package / "manifest.json").read_bytes()
    with pytest.raises(UsageError, match="cannot be the baseline of 2 graphs") as caught:
        verify_results(package, str(folder / "a.onnx"))
    assert caught.value.hint == f"name the graph: a={folder / 'a.onnx'} or b={folder / 'a.onnx'}"
    with pytest.raises(UsageError, match="a baseline is given for `c`, which is not a graph of the package"):
        verify_results(package, {"a": str(folder / "a.onnx"), "c": str(folder / "b.onnx")})
    assert (package / "manifest.json").read_bytes() == before


def test_the_only_graph_of_a_package_takes_an_unnamed_or_a_named_baseline(folder: Path) -> None:
    package = folder / "one.ryzen"
    (name,) = accuracy_records(package)
    for baseline in (str(folder / "a.onnx"), {name: str(folder / "a.onnx")}):
        ((baseline_name, met),) = verify_results(package, baseline).values()
        assert (baseline_name, met) == ("a.onnx", True)


def test_baselines_are_given_by_graph_on_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package, a, b = folder / "two.ryzen", folder / "a.onnx", folder / "b.onnx"
    assert run(["verify", str(package), "--baseline", f"a={a}", "--baseline", f"b={b}", "-q"]) == 0
    assert run(["verify", str(package), "--baseline", f"a={b}", "-q"]) == 1
    capsys.readouterr()
    assert run(["verify", str(package), "--baseline", str(a), "-q"]) == 2
    message = capsys.readouterr().err
    assert "cannot be the baseline of 2 graphs" in message
    assert f"a={a}" in message


def test_baselines_are_parsed_with_the_names_of_their_graphs(tmp_path: Path) -> None:
    assert parse_baselines(()) is None
    assert parse_baselines(("model.onnx",)) == "model.onnx"
    assert parse_baselines(("a=model.onnx", "b=recipe:minilm")) == {"a": "model.onnx", "b": "recipe:minilm"}
    file_with_sign = tmp_path / "a=b.onnx"
    file_with_sign.write_bytes(b"")
    assert parse_baselines((str(file_with_sign),)) == str(file_with_sign)
    with pytest.raises(UsageError, match=r"`other.onnx` names no graph"):
        parse_baselines(("a=model.onnx", "other.onnx"))
    with pytest.raises(UsageError, match="the graph `a` has two baselines"):
        parse_baselines(("a=model.onnx", "a=other.onnx"))
