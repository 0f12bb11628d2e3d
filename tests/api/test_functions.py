"""Tests of the functions of the public API on real models: results, diagnostics, and what wrong arguments raise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny_models

import ryzen_compile as rc


class Collector(rc.SilentProgress):
    """Keeps every reported diagnostic."""

    def __init__(self) -> None:
        self.diagnostics: list[rc.Diagnostic] = []

    def report(self, diagnostic: rc.Diagnostic) -> None:
        self.diagnostics.append(diagnostic)

    @property
    def codes(self) -> list[str]:
        return [diagnostic.code for diagnostic in self.diagnostics]


class Doubling(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write(tmp_path_factory.mktemp("api") / "small.onnx")


@pytest.fixture(scope="module")
def package(model: Path) -> rc.Package:
    return rc.build(model, gpu="cpu", cache=False, opt_shapes={"x": (2, tiny_models.WIDTH)})


def test_build_takes_shapes_as_mappings_or_text_for_one_profile_or_several(model: Path, tmp_path: Path) -> None:
    def profiles(**shapes: Any) -> list[str]:
        built = rc.build(model, tmp_path / "m.ryzen", gpu="cpu", cache=False, compare=False, **shapes)
        return [str(profile) for profile in built.manifest.graphs[0].profiles]

    assert profiles(opt_shapes={"x": (2, 16)}) == profiles(opt_shapes="x:2x16") == profiles(opt_shapes=["x:2x16"]) == ["x:2x16"]
    assert profiles(opt_shapes=[{"x": (2, 16)}, "x:4x16"]) == ["x:2x16", "x:4x16"]
    assert profiles(min_shapes={"x": (1, 16)}, max_shapes={"x": [8, 16]}) == ["min x:1x16  opt x:8x16  max x:8x16"]


def test_build_takes_builder_options_with_their_values(model: Path, tmp_path: Path) -> None:
    built = rc.build(
        model,
        tmp_path / "m.ryzen",
        gpu="sm89",
        compare=False,
        cache=False,
        options={"builderOptimizationLevel": 1, "sparsity": "enable", "directIO": False},
    )
    assert built.manifest.engines[0].options["builderOptimizationLevel"] == 1


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("build", {"precision": "fp15"}, "`precision` has no value `fp15`\n\nhint: did you mean `fp16`"),
        ("build", {"seed": -1}, r"`seed` must be in \[0, 4294967295\] \(got -1\)\n\nhint: "),
        ("build", {"time_limit_seconds": 0}, r"`time_limit_seconds` must be greater than 0 \(got 0\)\n\nhint: "),
        ("build", {"memory_limit_bytes": -1}, "`memory_limit_bytes` must be greater than 0"),
        ("build", {"gpu": "sm88"}, "unknown compute capability 88"),
        ("build", {"cache": True}, r"`cache` must be a path or False \(got bool: True\)\n\nhint: "),
        ("build", {"options": {"builderOptimisationLevel": 1}}, "did you mean `builderOptimizationLevel`"),
        ("rewrite", {"output": "o.onnx", "passes": "fold", "weights": "inside"}, "`weights` has no value `inside`\n\nhint: "),
        ("rewrite", {"output": "o.onnx", "passes": "fodl"}, "did you mean `fold`"),
        ("rewrite_steps", {"folder": "o", "passes": "fold", "steps": [0]}, "`0` is not a step width\n\nhint: "),
        ("rewrite_steps", {"folder": "o", "passes": "fold", "steps": 1}, "`steps` must be step widths: "),
        ("evaluate", {"baseline": "recipe:tinylm", "requirements": "kl<=1"}, "`requirements` must be a list of texts"),
        ("verify", {"baseline": Path("m.onnx")}, "`baseline` must be text, or texts by graph name: "),
        ("verify", {"baseline": {"model": Path("m.onnx")}}, "`baseline` must be text, or texts by graph name: "),
        ("bench", {"seconds": -1.0}, "`seconds` must be a finite number of at least 0"),
        ("bench", {"data": "x.npz", "shapes": "x:1x16"}, "leave one of the two out"),
        ("load", {"backend": "tensorrt-rxt"}, "there is no backend `tensorrt-rxt`\n\nhint: "),
        ("compare", {"baseline": "nothing"}, "there is no file `nothing`\n\nhint: "),
        ("compare", {"baseline": (Doubling(), {"x": torch.zeros(1, 16)}), "cosine": 2.0}, "`cosine` must be in"),
        ("compare", {"baseline": 3}, "return a Recipe, a torch.nn.Module"),
        ("export", {"max_abs": -1.0}, "`max_abs` must be at least 0"),
    ],
)
def test_a_bad_value_is_a_usage_error_with_a_hint(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, arguments: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(rc.UsageError, match=message) as caught:
        getattr(rc, function)(model, **arguments)
    assert caught.value.diagnostics[0].code == "usage"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "function", ["bench", "build", "compare", "evaluate", "export", "inspect", "load", "rewrite", "verify"]
)
def test_a_mistyped_keyword_is_a_usage_error(function: str) -> None:
    with pytest.raises(rc.UsageError, match="has no argument `bakend`"):
        getattr(rc, function)("m.onnx", bakend="cpu")


def test_a_pipeline_with_two_problems_raises_two_diagnostics(model: Path, tmp_path: Path) -> None:
    with pytest.raises(rc.PipelineError) as caught:
        rc.rewrite(model, tmp_path / "o.onnx", passes="kv-quant,kv-quant")
    assert [(one.code, one.location, one.severity) for one in caught.value.diagnostics] == [
        ("property-missing", "kv-quant", "error"),
        ("property-invalidated", "kv-quant", "error"),
    ]


def test_rewrite_reports_what_each_pass_did(model: Path, tmp_path: Path) -> None:
    progress = Collector()
    result = rc.rewrite(model, tmp_path / "folded.onnx", passes="fold", progress=progress)
    assert result.path == str(tmp_path / "folded.onnx")
    assert [record.outcome for record in result.passes] == ["changed"]
    assert progress.codes == ["pass-changed"]
    assert progress.diagnostics[0].location == "folded.onnx"
    half = rc.rewrite(model, tmp_path / "half.onnx", passes="precision{to=fp16}", progress=progress)
    assert half.passes[0].pass_spec == "precision{to=fp16}"
    assert progress.codes[1:3] == ["half-precision", "pass-changed"]


def test_compare_takes_modules_recipes_and_files(package: rc.Package, model: Path) -> None:
    report = rc.compare(package.path, model)
    assert report.met
    assert report.diagnostics == ()
    module = (Doubling(), {"x": torch.ones(2, tiny_models.WIDTH)})
    differing = rc.compare(package.path, module)
    assert not differing.met
    assert differing.comparisons[0].baseline == "Doubling"
    assert {(one.code, one.severity) for one in differing.diagnostics} == {("criterion-not-met", "error")}
    loose = rc.compare(package.path, module, max_abs=1e9, relative_l2=1e9, cosine=-1)
    assert loose.met


def test_compare_finds_the_first_node_that_differs(model: Path, tmp_path: Path) -> None:
    scaled = tiny_models.write(tmp_path / "scaled.onnx", scale=0.75)
    report = rc.compare(model, scaled, bisect=True)
    assert report.divergence is not None
    assert report.divergence.divergent_node is not None


def test_export_takes_a_module_with_its_inputs(tmp_path: Path) -> None:
    report = rc.export((Doubling(), {"x": torch.ones(2, 3)}), tmp_path / "double.onnx", dynamic={"x": {0: "batch"}})
    assert report.inputs == ("x: float32[batch, 3]",)
    assert rc.compare(report.path, (Doubling(), {"x": torch.ones(2, 3)})).met
    with pytest.raises(rc.UsageError, match="no name to derive the output path from"):
        rc.export((Doubling(), {"x": torch.ones(2, 3)}))


def test_bench_verify_and_inspect_use_a_package(package: rc.Package, model: Path) -> None:
    progress = Collector()
    timings = rc.bench(
        package.path, against=model, shapes={"x": (2, 16)}, seconds=0, warm_up_seconds=0, min_iterations=2, progress=progress
    )
    assert [timing.runs for timing in timings.timings] == [2, 2]
    assert timings.shapes == {"x": (2, 16)}
    assert timings.ratio is not None
    assert progress.codes == ["engine-chosen", "engine-chosen"]
    verification = rc.verify(package.path, baseline=str(model))
    assert verification.met
    manifest = rc.inspect(package.path, check_digests=True).manifest
    assert manifest == verification.package.manifest
    assert manifest.graphs[0].variants[0].accuracy[-1].baseline.startswith("small.onnx")
    with rc.load(package.path) as engine:
        assert engine(x=np.ones((2, 16), np.float32)).shape == (2, 16)


def test_importing_the_api_imports_no_framework() -> None:
    heavy = ("torch", "onnxruntime", "onnx_ir", "onnx", "numpy", "polygraphy", "rich", "msgspec")
    code = f"import sys, ryzen_compile, ryzen_compile.api as api; api.build; print([n for n in {heavy} if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
