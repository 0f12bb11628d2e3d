"""Tests of commands on ONNX files that are not in a package, and of trtexec's names of the model and the engine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
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


def test_the_elements_of_a_sequence_output_are_shown_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = """<ir_version: 10, opset_import: ["" : 21]>
        g (float[4] x) => (seq(float[2]) s) { s = SplitToSequence <axis = 0> (x, two) }"""
    model = onnx.parser.parse_model(source)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(2), "two"))
    onnx.save(model, tmp_path / "s.onnx")
    assert run(["run", str(tmp_path / "s.onnx"), "--save-outputs", str(tmp_path / "s.npz")]) == 0
    assert "s[1]" in capsys.readouterr().out
    with np.load(tmp_path / "s.npz") as saved:
        assert {name: saved[name].shape for name in saved} == {"s[0]": (2,), "s[1]": (2,)}


def test_an_onnx_file_is_inspected(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(model)]) == 0
    output = capsys.readouterr().out
    assert "input x: float32[batch, 16], values" in output
    assert "ops MatMul 2" in output
    assert f"next: ryzen-compile build {model} --gpu cpu" in output
    assert run(["inspect", str(model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ops"]["MatMul"] == 2


def test_weights_in_constant_nodes_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (float[N,2] x) => (float[N,2] y) { w = Constant <value = float[2,2] {1, 2, 3, 4}> ()  y = MatMul (x, w) }"""
    )
    onnx.save(model, tmp_path / "c.onnx")
    assert run(["inspect", str(tmp_path / "c.onnx")]) == 0
    assert "2 nodes, 16 B of weights" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("imports", "opset", "text"),
    [
        ({"": 18}, 18, "opset 18"),
        ({"ai.onnx": 18}, 18, "opset 18"),
        ({"custom": 2}, None, "no standard opset"),
    ],
)
def test_the_opset_is_that_of_the_standard_domain(
    imports: dict[str, int], opset: int | None, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = {name: helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in "xy"}
    (domain,) = imports
    graph = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["y"], domain=domain.removeprefix("ai.onnx"))], "g", [value["x"]], [value["y"]]
    )
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid(*item) for item in imports.items()]), path)
    assert run(["inspect", str(path)]) == 0
    assert capsys.readouterr().out.startswith(f"{path}: {text}, 1 nodes, ")
    assert run(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["opset"] == opset


def test_digests_of_an_onnx_file_cannot_be_checked(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--check"], ["--check", "--kv"], ["--check", "--json"]):
        assert run(["inspect", str(model), *options]) == 2
        output = capsys.readouterr()
        assert "an ONNX file has none" in output.err
        assert "leave --check out" in output.err
    package = rc.build(model, tmp_path / "m.ryzen", gpu="cpu", compare=False, cache=False)
    assert run(["inspect", str(package.path), "--check", "--kv"]) == 2
    assert "leave --kv out" in capsys.readouterr().err


def test_build_takes_the_names_of_trtexec(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = tmp_path / "m.ryzen"
    arguments = ["build", f"--onnx={model}", f"--saveEngine={package}", "--gpu", "cpu", "--no-compare", "--no-cache"]
    assert run(arguments) == 0
    assert (package / "manifest.json").is_file()
    assert run([*arguments, str(model)]) == 2
    assert run(["build", "--gpu", "cpu"]) == 2
    assert capsys.readouterr().err.count("give one model") == 2


def test_a_model_that_does_not_run_with_random_inputs_leads_to_shapes_and_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]> g (float[n] x) => (float[n] y) {
        w = Constant <value_floats = [1.0, 2.0, 3.0]> ()  y = Add (x, w) }"""
    path = str(tmp_path / "three.onnx")
    onnx.save(onnx.parser.parse_model(text), path)
    for command in (["run", path], ["bench", path, "--duration", "0"]):
        assert run(command) == 1
        hint = (
            "give other shapes, with which it runs, in the form of these: --shapes x:128; or valid inputs with --data FILE.npz"
        )
        assert capsys.readouterr().err.splitlines()[-1] == f"hint: {hint}"
        assert run([*command, "--shapes", "x:3"]) == 0
    capsys.readouterr()
    assert run(["compare", path, "--baseline", path]) == 1
    assert "hint: give --min-shapes, --opt-shapes and --max-shapes at which both run" in capsys.readouterr().err
    assert run(["compare", path, "--baseline", path, "--opt-shapes", "x:3"]) == 0


def test_bench_counts_samples(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", str(model), "--shapes", "x:4x16", "--duration", "0", "--json"]) == 0
    timings = json.loads(capsys.readouterr().out)
    assert timings["batch"] == 4
    assert run(["bench", str(model), "--shapes", "x:4x16", "--duration", "0"]) == 0
    output = capsys.readouterr().out
    assert "batch 4" in output
    assert "samples/s" in output


def test_a_scalar_input_takes_no_array_of_another_rank(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float s, float[2] x) => (float[n] y) { y = Add (s, x) }'
    )
    onnx.save(model, tmp_path / "g.onnx")
    x = np.ones(2, np.float32)
    with rc.load(tmp_path / "g.onnx") as engine:
        for scalar in (np.float32(2), np.array(2, np.float32), 2, 2.0):
            assert engine.run(s=scalar, x=x)["y"].tolist() == [3, 3]
        with pytest.raises(rc.ShapeError, match="`s` has 2 dimensions, expected 0"):
            engine.run(s=np.ones((2, 2), np.float32), x=x)
        with pytest.raises(rc.ShapeError, match="`s` is float64, expected float32"):
            engine.run(s=np.float64(2), x=x)
