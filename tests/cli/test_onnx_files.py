"""Tests of commands on ONNX files that are not in a package, and of trtexec's names of the model and the engine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support import tiny_models

import ryzen_compile as rc
from ryzen_compile.cli.main import run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write(tmp_path_factory.mktemp("files") / "small.onnx")


def test_an_onnx_file_runs_and_is_loaded(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["run", str(model), "--shapes", "x:3x16"]) == 0
    assert "float32[3, 16]" in capsys.readouterr().out
    with rc.load(model) as engine:
        assert engine(np.zeros((700, tiny_models.WIDTH), np.float32)).shape == (700, tiny_models.WIDTH)
    with pytest.raises(rc.UsageError, match="is an ONNX file, which has one graph"):
        rc.load(model, variant="fold")


def test_an_onnx_file_is_inspected(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(model)]) == 0
    output = capsys.readouterr().out
    assert "input x: float32[batch, 16], values" in output
    assert "ops MatMul 2" in output
    assert f"next: ryzen-compile build {model} --gpu cpu" in output
    assert run(["inspect", str(model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ops"]["MatMul"] == 2


def test_build_takes_the_names_of_trtexec(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = tmp_path / "m.ryzen"
    arguments = ["build", f"--onnx={model}", f"--saveEngine={package}", "--gpu", "cpu", "--no-compare", "--no-cache"]
    assert run(arguments) == 0
    assert (package / "manifest.json").is_file()
    assert run([*arguments, str(model)]) == 2
    assert run(["build", "--gpu", "cpu"]) == 2
    assert capsys.readouterr().err.count("give one model") == 2


def test_bench_counts_samples(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", str(model), "--shapes", "x:4x16", "--duration", "0", "--json"]) == 0
    timings = json.loads(capsys.readouterr().out)
    assert timings["batch"] == 4
    assert run(["bench", str(model), "--shapes", "x:4x16", "--duration", "0"]) == 0
    output = capsys.readouterr().out
    assert "batch 4" in output
    assert "samples/s" in output
