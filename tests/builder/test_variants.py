"""Variants by pipeline: several variants of one graph in one package are compared, measured, loaded and shown by name."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import fake_passes, tiny_models
from support.external_packages import run_program

import ryzen_compile as rc
from ryzen_compile import registry
from ryzen_compile.artifacts.package.manifest import AccuracyFloor
from ryzen_compile.artifacts.package.read import read_package
from ryzen_compile.cli.main import run
from ryzen_compile.errors import PackageError, PipelineError, UsageError
from ryzen_compile.ir.save import save
from ryzen_compile.numerics.candidate import Candidate
from ryzen_compile.numerics.candidate_lookup import find_candidate, find_candidates
from ryzen_compile.numerics.criteria import criteria_between, default_criteria, floor_criteria

ROUNDING = "acme-round-weights{levels=16,floor=0.9}"
EXACT, LOSSY = "fold", "fold+acme-round-weights.levels-16.floor-0.9"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package for the CPU with an exact and a lossy variant of one graph; the lossy pass is one of another distribution."""
    folder = tmp_path_factory.mktemp("variants")
    tiny_models.write(folder / "small.onnx")
    run_program("build", "small.onnx", "--gpu", "cpu", "-q", "-p", "fold", "-p", f"fold,{ROUNDING}", cwd=folder)
    return folder / "small.ryzen"


def rows(count: int = 5) -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).standard_normal((count, tiny_models.WIDTH)).astype(np.float32)


def test_variants_of_one_graph_stand_in_one_package_each_with_its_passes_and_accuracy(package: Path) -> None:
    (graph,) = read_package(package).manifest.graphs
    assert [(variant.name, variant.path) for variant in graph.variants] == [
        (EXACT, f"graphs/model.{EXACT}.onnx"),
        (LOSSY, f"graphs/model.{LOSSY}.onnx"),
    ]
    assert [[record.pass_spec for record in variant.passes] for variant in graph.variants] == [["fold"], ["fold", ROUNDING]]
    for variant in graph.variants:
        assert variant.accuracy
        assert all(accuracy.met for accuracy in variant.accuracy)
    assert any(ROUNDING in accuracy.criteria for accuracy in graph.variants[1].accuracy)
    assert not any(ROUNDING in accuracy.criteria for accuracy in graph.variants[0].accuracy)


def test_a_variant_is_loaded_by_name_and_the_first_is_the_default(package: Path) -> None:
    x = rows()
    outputs = {}
    for name in (None, EXACT, LOSSY, "fold+acme"):
        with rc.load(package, variant=name) as engine:
            outputs[name] = engine(x=x)
            assert engine.choice.variant == (EXACT if name in (None, EXACT) else LOSSY)
            assert ("as named" if name else "the default of 2") in engine.choice.summary
    np.testing.assert_array_equal(outputs[None], outputs[EXACT])
    np.testing.assert_array_equal(outputs["fold+acme"], outputs[LOSSY])
    np.testing.assert_allclose(outputs[EXACT], tiny_models.expected(x), rtol=1e-5, atol=1e-5)
    assert 0.01 < np.abs(outputs[LOSSY] - outputs[EXACT]).max() < 1


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("fold+acme-round-weight.levels-16", "graph `model` has no variant", f"did you mean `{LOSSY}`?"),
        ("fp16", "graph `model` has no variant `fp16`", f"available: `{EXACT}`, `{LOSSY}`"),
        ("fol", "several variants begin with `fol`", f"name one of {EXACT}, {LOSSY}"),
        ("", "graph `model` has no variant ``", f"available: `{EXACT}`, `{LOSSY}`"),
    ],
)
def test_a_wrong_name_of_a_variant_is_a_usage_error(package: Path, name: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        rc.load(package, variant=name)
    assert caught.value.hint == hint


def test_two_variants_are_compared_with_each_other(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    candidate, baseline = f"{package}@{LOSSY}", f"{package}@{EXACT}"
    assert run(["compare", candidate, "--baseline", baseline, "--json"]) == 0
    (comparison,) = json.loads(capsys.readouterr().out)["comparisons"]
    assert (comparison["candidate"], comparison["baseline"]) == (candidate, baseline)
    accuracy = comparison["accuracy"]
    assert [f"model.{name}.onnx" in accuracy[side] for name, side in ((LOSSY, "candidate"), (EXACT, "baseline"))] == [
        True,
        True,
    ]
    assert accuracy["criteria"] == f"the floor of `{ROUNDING}`: cosine >= 0.9"
    worst = {metric["name"]: metric["worst"] for metric in accuracy["metrics"]}
    assert worst["max_abs"] > 0.01
    assert run(["compare", candidate, "--baseline", baseline, "-q", "--cosine", "0.9"]) == 1, "the other limits apply too"
    limits = ["--max-abs", "1", "--relative-l2", "0.5", "--cosine", "0.9"]
    assert run(["compare", candidate, "--baseline", baseline, "-q", *limits]) == 0
    assert run(["compare", baseline, "--baseline", baseline, "-q", "--max-abs", "0"]) == 0


def test_two_variants_are_measured_in_one_paired_run(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timing = ["--duration", "0.05", "--warm-up", "1", "--iterations", "3", "--json"]
    assert run(["bench", f"{package}@{EXACT}", "--against", f"{package}#model@fold+acme", *timing]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in result["timings"]] == [f"small.ryzen@{EXACT}", "small.ryzen#model@fold+acme"]
    for name, entry in zip((EXACT, LOSSY), result["timings"], strict=True):
        assert f"graphs/model.{name}.onnx" in entry["description"]
    assert result["ratio"] > 0
    assert run(["bench", str(package), "--variant", LOSSY, *timing]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["timings"]
    assert f"model.{LOSSY}.onnx" in entry["description"]


@pytest.mark.parametrize(
    "arguments",
    [
        (f"@{LOSSY}",),
        (f"#model@{LOSSY}",),
        (f"@{LOSSY}@onnxruntime",),
        ("", "--variant", LOSSY),
        (f"@{LOSSY}", "--variant", LOSSY),
    ],
)
def test_run_takes_the_name_of_a_variant(package: Path, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    suffix, *options = arguments
    assert run(["run", f"{package}{suffix}", *options, "--json"]) == 0
    assert f"graphs/model.{LOSSY}.onnx by onnxruntime" in json.loads(capsys.readouterr().out)["choice"]


def test_a_reference_and_an_option_that_differ_are_a_usage_error(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["run", f"{package}@{LOSSY}", "--variant", EXACT]) == 2
    assert f"names the variant `{LOSSY}`, and --variant names `{EXACT}`" in capsys.readouterr().err


def test_inspect_names_the_default(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(package), "-v"]) == 0
    output = capsys.readouterr().out
    assert f"  {EXACT}  graphs/model.{EXACT}.onnx, fp32, runs on the CPU (default)\n" in output
    assert f"  {LOSSY}  graphs/model.{LOSSY}.onnx, fp32, runs on the CPU\n" in output


def test_inspect_shows_one_variant(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", f"{package}@{LOSSY}"]) == 0
    output = capsys.readouterr().out
    assert f"graphs/model.{LOSSY}.onnx" in output
    assert f"graphs/model.{EXACT}.onnx" not in output
    assert run(["inspect", f"{package}@{LOSSY}", "--json"]) == 0
    (graph,) = json.loads(capsys.readouterr().out)["manifest"]["graphs"]
    assert [variant["name"] for variant in graph["variants"]] == [LOSSY]
    assert run(["inspect", f"{package}@nothing"]) == 2


def test_a_lossy_variant_below_its_floor_fails_the_build_and_is_named(tmp_path: Path) -> None:
    tiny_models.write(tmp_path / "small.onnx")
    pipelines = ("-p", "fold", "-p", "acme-round-weights{levels=3,floor=0.9999}")
    result = run_program("build", "small.onnx", "--gpu", "cpu", "-q", *pipelines, cwd=tmp_path, exit_code=1)
    assert "error: graphs/model.acme-round-weights.levels-3.floor-0.9999.onnx: does not meet y cosine" in result.stderr
    assert " after `acme-round-weights{levels=3,floor=0.9999}`: worst value" in result.stderr
    assert "`graphs/model.fold.onnx`" not in result.stderr


@pytest.fixture(scope="module")
def half_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package for the CPU and a GPU, of two pipelines that are the same without half precision."""
    folder = tmp_path_factory.mktemp("half")
    source = tiny_models.write(folder / "small.onnx")
    return rc.build(source, gpu="cpu,sm89", passes=["fold,precision{to=fp16}", "fold"], cache=folder / "cache").path


def test_every_pipeline_has_an_engine_for_each_backend_and_equal_graphs_have_one_file(half_package: Path) -> None:
    manifest = read_package(half_package).manifest
    variants = {(variant.name, variant.backend): variant for variant in manifest.graphs[0].variants}
    half, full, portable = ("fold+precision.to-fp16", "tensorrt-rtx"), ("fold", "tensorrt-rtx"), ("fold", "onnxruntime")
    assert list(variants) == [half, full, portable]
    assert variants[full].path == variants[portable].path == "graphs/model.fold.onnx"
    assert variants[full].accuracy == variants[portable].accuracy
    assert [variants[key].portable for key in (half, full, portable)] == [False, False, True]
    assert [variants[key].portable_form for key in (half, full, portable)] == ["fold", "fold", None]
    assert [(engine.variant, engine.path) for engine in manifest.engines] == [
        (name, f"engines/model.{name}@tensorrt-rtx.sm89.plan") for name, _ in (half, full)
    ]
    assert {part for part in manifest.key_parts if part.startswith("graphs.model.passes.")} == {
        f"graphs.model.passes.{name}@{backend}" for name, backend in variants
    }


def test_a_variant_for_engines_is_not_replaced_by_another_where_no_engine_runs(half_package: Path) -> None:
    with pytest.raises(PackageError, match="no NVIDIA driver was found") as caught:
        rc.load(half_package, variant="fold+precision")
    assert "load `fold`, its portable variant" in str(caught.value.hint)
    with rc.load(half_package) as engine:
        assert engine.choice.variant == "fold"


def test_verify_compares_a_variant_with_its_portable_form(half_package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(half_package), "--json"]) == 0
    (comparison,) = json.loads(capsys.readouterr().out)["comparisons"]
    assert comparison["candidate"].endswith("@fold+precision.to-fp16")
    assert comparison["baseline"].endswith("@fold")


def test_verify_holds_a_lossy_variant_to_its_floor(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(package, tmp_path / "copy.ryzen")
    baseline = str(package.parent / "small.onnx")
    assert run(["verify", str(copy), "--baseline", baseline, "--json"]) == 0
    comparisons = json.loads(capsys.readouterr().out)["comparisons"]
    assert [comparison["accuracy"]["criteria"] for comparison in comparisons] == [
        "the defaults of ryzen-compile",
        f"the floor of `{ROUNDING}`: cosine >= 0.9",
    ]


def test_verify_compares_a_lossy_variant_for_engines_with_its_portable_variant_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The floor alone would not find an error of the conversion to half precision."""
    source = tiny_models.write(tmp_path / "small.onnx")
    run_program("build", source, "--gpu", "cpu,sm89", "-q", "-p", f"{ROUNDING},precision{{to=fp16}}", cwd=tmp_path)
    assert run(["verify", str(tmp_path / "small.ryzen"), "--baseline", str(source), "--json"]) == 0
    comparisons = json.loads(capsys.readouterr().out)["comparisons"]
    half = [item for item in comparisons if "precision" in item["candidate"]]
    assert [item["baseline"].rpartition("/")[2].partition("@")[0] for item in half] == ["small.onnx", "small.ryzen"]
    assert [item["accuracy"]["criteria"] for item in half] == [
        f"the floor of `{ROUNDING}`: cosine >= 0.9",
        "the defaults of ryzen-compile",
    ]


def test_a_lossy_baseline_is_refused_for_a_bisection(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(package.parent / "small.onnx")
    arguments = ["compare", f"{package}@{EXACT}", "--baseline", f"{package}@{LOSSY}", "--bisect", "--source", source]
    assert run(arguments) == 2
    assert "--bisect requires a baseline without lossy passes" in capsys.readouterr().err


@pytest.mark.parametrize("baseline_has_same_passes", [False, True])
def test_numeric_criteria_apply_between_candidates_with_the_same_lossy_passes(baseline_has_same_passes: bool) -> None:
    floor = AccuracyFloor(metric="cosine", value=0.9, origin="the pipeline", passes=("prune",))
    other = AccuracyFloor(metric="cosine", value=0.9, origin="the pipeline", passes=("prune",) * baseline_has_same_passes)
    candidate, baseline = (
        Candidate(name="m", description="m", interface=None, open=contextlib.nullcontext, accuracy_floor=value)  # type: ignore[arg-type]
        for value in (floor, other)
    )
    expected = default_criteria() if baseline_has_same_passes else floor_criteria("cosine", 0.9, "the pipeline")
    assert criteria_between(candidate, baseline, None) == expected
    given = default_criteria().override(cosine=0.5)
    assert criteria_between(candidate, baseline, given) is given


@pytest.mark.parametrize(
    "passes", [("fold", "fold"), ("none", "none"), ("fold,precision{to=fp16}", "fold, precision{to=fp16}")]
)
def test_a_pipeline_that_is_given_twice_is_a_usage_error(passes: tuple[str, ...], tmp_path: Path) -> None:
    source = tiny_models.write(tmp_path / "small.onnx")
    with pytest.raises(UsageError, match="are the same"):
        rc.build(source, gpu="cpu", passes=passes, cache=False)
    assert not (tmp_path / "small.ryzen").exists()


def test_an_empty_pipeline_is_called_source_and_one_text_is_one_pipeline(tmp_path: Path) -> None:
    source = tiny_models.write(tmp_path / "small.onnx")

    def names(passes: Any) -> list[str]:
        package = rc.build(source, gpu="cpu", passes=passes, cache=False, compare=False)
        return [variant.name for variant in package.manifest.graphs[0].variants]

    assert names("none") == ["source"]
    assert names(["none", "fold"]) == ["source", "fold"]
    assert names([]) == names(None) == ["fold"]


def test_explain_shows_every_variant_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny_models.write(tmp_path / "small.onnx")
    assert run(["explain", str(source), "--gpu", "cpu,sm89", "-p", "none", "-p", "fold", "--bf16", "--json"]) == 0
    (graph,) = json.loads(capsys.readouterr().out)["graphs"]
    names = [pipeline["variant"] for pipeline in graph["pipelines"]]
    assert names == ["precision.to-bf16", "fold+precision.to-bf16", "source", "fold"]


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The toy model of the fake passes, which are registered beside the others."""
    classes = (fake_passes.ReplaceForOneBackend, fake_passes.NeedsNoNeg, fake_passes.NeedsNoRelu, fake_passes.DuplicateName)
    by_name = {cls.name: cls for cls in classes}
    find_pass = registry.find_pass
    monkeypatch.setattr(registry, "find_pass", lambda name: by_name.get(name) or find_pass(name))
    save(fake_passes.toy_model(), tmp_path / "toy.onnx")
    return tmp_path / "toy.onnx"


@pytest.mark.parametrize("command", ["build", "rewrite"])
def test_a_pass_that_returns_an_invalid_graph_is_named_and_nothing_is_written(
    toy: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(toy.parent.iterdir())
    arguments = ["--no-cache", "--no-compare", "-q"] if command == "build" else [str(toy.with_name("o.onnx"))]
    assert run([command, str(toy), "--passes", "duplicate-name", *arguments]) == 1
    assert "defect in pass `duplicate-name`: its result is not valid: " in capsys.readouterr().err
    assert sorted(toy.parent.iterdir()) == before


def test_variants_of_one_name_have_the_backend_in_their_path_only_if_their_graphs_differ(toy: Path) -> None:
    package = rc.build(toy, gpu="cpu,sm89", passes=["none", "replace-for-one-backend"], compare=False, cache=False)
    paths = {(variant.name, variant.backend): variant.path for variant in package.manifest.graphs[0].variants}
    assert paths == {
        ("source", "tensorrt-rtx"): "graphs/model.source.onnx",
        ("source", "onnxruntime"): "graphs/model.source.onnx",
        ("replace-for-one-backend", "tensorrt-rtx"): "graphs/model.replace-for-one-backend.onnx",
        ("replace-for-one-backend", "onnxruntime"): "graphs/model.replace-for-one-backend@onnxruntime.onnx",
    }
    assert set(paths.values()) == {file.path for file in package.manifest.files if file.path.startswith("graphs/")}
    names = [candidate.name for candidate in find_candidates(f"{package.path}@replace")]
    assert names == [f"{package.path}@replace-for-one-backend@{backend}" for backend in ("tensorrt-rtx", "onnxruntime")]
    assert find_candidate(names[0]).package_file == paths["replace-for-one-backend", "tensorrt-rtx"]


def test_pipelines_that_are_the_same_once_ordered_are_refused(toy: Path) -> None:
    passes = ["needs-no-neg,needs-no-relu", "needs-no-relu,needs-no-neg"]
    package = rc.build(toy, gpu="cpu", passes=passes[0], compare=False, cache=False)
    assert [variant.name for variant in package.manifest.graphs[0].variants] == ["needs-no-relu+needs-no-neg"]
    with pytest.raises(PipelineError, match="two pipelines are `needs-no-relu,needs-no-neg` once their passes are ordered"):
        rc.build(toy, gpu="cpu", passes=passes, compare=False, cache=False)
