"""The backend of an external package: it builds, is loaded, run and compared as the backends of this tree are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from support import tiny_models
from support.external_packages import ACME, copy_acme, environment, run_program

from ryzen_compile.backends.api import BuildRequest
from ryzen_compile.backends.process.in_process import InProcessWorker
from ryzen_compile.errors import BackendError, RyzenError
from ryzen_compile.spec.target import parse_targets

BUILD = ("build", "small.onnx", "--gpu", "cpu", "--backend", "acme-reference")
ENGINE = "engines/model.fold@acme-reference.cpu.plan"
FILE = "acme_reference.py"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_models.write(tmp_path / "small.onnx")
    return tmp_path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the package `small.ryzen`, which contains an engine of the external backend."""
    folder = tmp_path_factory.mktemp("external")
    tiny_models.write(folder / "small.onnx")
    run_program(*BUILD, "-q", cwd=folder)
    return folder


def test_the_backend_is_listed(tmp_path: Path) -> None:
    assert "acme-reference: available: runs graphs with onnx on the CPU" in run_program("doctor", cwd=tmp_path).stdout
    targets = run_program("targets", cwd=tmp_path).stdout
    assert next(line for line in targets.splitlines() if line.startswith("cpu ")).split() == [
        "cpu",
        "onnxruntime,",
        "acme-reference",
    ]


def test_the_engine_is_chosen_and_computes_the_outputs(built: Path) -> None:
    script = (
        "import sys, numpy, ryzen_compile as rc\n"
        "with rc.load('small.ryzen') as engine:\n"
        "    assert engine.choice.backend == 'acme-reference' and engine.choice.gpu is None, engine.choice\n"
        "    numpy.save('y.npy', engine.run(x=numpy.load('x.npy'))['y'])\n"
    )
    x = np.random.default_rng(0).standard_normal((3, tiny_models.WIDTH)).astype(np.float32)
    np.save(built / "x.npy", x)
    subprocess.run([sys.executable, "-c", script], cwd=built, env=environment(built), check=True)
    np.testing.assert_allclose(np.load(built / "y.npy"), tiny_models.expected(x), atol=1e-5)
    assert f"{ENGINE} by acme-reference, built for cpu" in run_program("run", "small.ryzen", cwd=built).stderr


def test_the_engine_is_compared_on_the_processor_and_the_result_recorded(built: Path) -> None:
    arguments = ("compare", "small.ryzen@acme-reference", "--baseline", "small.onnx", "--json")
    (comparison,) = json.loads(run_program(*arguments, cwd=built).stdout)["comparisons"]
    assert ENGINE in comparison["accuracy"]["candidate"]
    assert comparison["accuracy"]["met"]
    run_program("verify", "small.ryzen", "-q", cwd=built)
    (engine,) = json.loads((built / "small.ryzen" / "manifest.json").read_text())["engines"]
    assert [(entry["level"], entry.get("met")) for entry in engine["provenance"]][-1] == ("compared", True)


def test_without_the_backend_the_portable_graph_runs(built: Path) -> None:
    output = run_program("run", "small.ryzen", cwd=built, packages=()).stderr
    assert "graphs/model.fold.onnx by onnxruntime" in output
    assert "needs the backend `acme-reference`, which is not installed" in output


def test_builder_options_of_tensorrt_are_refused_by_name(folder: Path) -> None:
    error = run_program(*BUILD, "--builderOptimizationLevel", "3", cwd=folder, exit_code=1).stderr
    assert "`acme-reference` does not support `--builderOptimizationLevel`: the backend has no builder options" in error


def defective_backend(old: str, new: str) -> InProcessWorker:
    """Return the worker of the backend, with `old` replaced by `new` in its source."""
    source = (ACME / "acme_backends" / FILE).read_text(encoding="utf-8")
    assert old in source
    module: dict[str, Any] = {"__name__": "defective_backend"}
    exec(compile(source.replace(old, new), FILE, "exec"), module)
    return InProcessWorker(module["BACKEND"])


def request(folder: Path, **limits: Any) -> BuildRequest:
    return BuildRequest(
        onnx_path=str(folder / "small.onnx"), output=str(folder / "e.plan"), targets=parse_targets("cpu"), profiles=(), **limits
    )


@pytest.mark.parametrize("limits", [{"seconds": 5.0}, {"memory_bytes": 1 << 30}])
def test_limits_that_cannot_be_enforced_are_refused(folder: Path, limits: dict[str, Any]) -> None:
    with pytest.raises(BackendError, match="limits neither its memory nor its time"):
        defective_backend("", "").build(request(folder, **limits))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (".read_bytes()", ".read_bytes(1)", "`acme-reference` failed: TypeError"),
        ("path=request.output,", "path=request.onnx_path,", "`acme-reference` wrote no engine to the requested path"),
        ("hashlib.sha256(data)", "hashlib.sha256(b'')", "returned a sha256 that is not the one of the engine"),
        ("return BuiltEngine(", "raise OSError(28, 'disk full')\n        return BuiltEngine(", "cannot be written.*disk full"),
    ],
)
def test_a_defective_backend_is_named_and_leaves_no_engine(folder: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(RyzenError, match=message):
        defective_backend(old, new).build(request(folder))
    assert not (folder / "e.plan").exists()


def test_an_op_that_the_backend_does_not_implement_is_a_refused_target(folder: Path) -> None:
    text = '<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]> g (float[2,4] x) => (float[2,4] y) '
    onnx.save(onnx.parser.parse_model(text + "{ y = com.microsoft.FastGelu (x) }"), folder / "small.onnx")
    run_program(*BUILD, "--passes", "none", cwd=folder, exit_code=1)
    (refused,) = json.loads((folder / "small.ryzen" / "manifest.json").read_text())["refused_targets"]
    assert refused["backend"] == "acme-reference"
    assert refused["reason"].startswith("`acme-reference` refuses `graphs/model.source.onnx`: ")


def test_a_change_of_the_backend_invalidates_the_cached_engine(folder: Path) -> None:
    assert "taken from the cache" not in run_program(*BUILD, cwd=folder).stderr
    assert "taken from the cache" in run_program(*BUILD, cwd=folder).stderr
    changed = copy_acme(folder / "changed", {FILE: ("that is ready to run", "which is ready to run")})
    messages = run_program(*BUILD, cwd=folder, packages=(changed,)).stderr
    assert "engines/model.fold@acme-reference.cpu.plan: taken from the cache" not in messages
    assert "graphs/model.fold.onnx for onnxruntime: taken from the cache" in messages, (
        "the variant does not depend on the backend"
    )


def test_an_external_portable_backend_does_not_replace_the_portable_backend(folder: Path) -> None:
    portable = copy_acme(folder / "portable", {FILE: ("priority=200,", "priority=200, portable=True,")})
    run_program(*BUILD, "-q", cwd=folder, packages=(portable,))
    manifest = json.loads((folder / "small.ryzen" / "manifest.json").read_text())
    variants = manifest["graphs"][0]["variants"]
    assert {variant["backend"]: variant["portable"] for variant in variants} == {"onnxruntime": True, "acme-reference": False}
    assert [(variant["name"], variant["path"]) for variant in variants] == [("fold", "graphs/model.fold.onnx")] * 2
