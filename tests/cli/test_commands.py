"""Tests of every command on a real package: output, exit codes, and one message per refusal."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support import tiny_models
from support.in_process import call_here

from ryzen_compile import registry
from ryzen_compile.cli.command_group import _section_and_description
from ryzen_compile.cli.main import run
from ryzen_compile.errors import ShapeError

COMMANDS = registry.names("commands")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli")
    tiny_models.write(path / "small.onnx")
    arguments = ["build", str(path / "small.onnx"), "--gpu", "cpu,sm89", "--fp16", "--cache", str(path / "cache"), "-q"]
    assert run(arguments) == 0
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--help"]) == 0
    assert "Usage: ryzen-compile" in capsys.readouterr().out


def test_the_main_help_lists_every_command_with_its_description(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    output = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n  {command} " in output
    assert "Build a package of engines from an ONNX file" in output
    sections = re.findall(r"^(\w.*):$", output, re.MULTILINE)
    assert sections == ["Options", "Compile", "Run", "Measure accuracy", "Inspect", "Manage files"]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_main_help_reads_the_section_that_the_module_of_the_command_declares(command: str) -> None:
    module = importlib.import_module(registry.module_name("commands", command))
    description = inspect.getdoc(module).partition("\n")[0].rstrip(".")
    assert _section_and_description(command) == (module.SECTION, description)


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("ryzen-compile, version 0.")


def test_an_option_with_fixed_values_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["passes", "kv-select"]) == 0
    assert "page-score: bound | cosine, default bound\n" in capsys.readouterr().out
    assert run(["passes", "kv-quant"]) == 0
    assert "keys: fp8 | 8 | 4 | 16, default 8\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["biuld"], 2, "did you mean `build`?"),
        (["build"], 2, "give one model"),
        (["build", "x.onnx", "--saveEngine", "e"], 1, "x.onnx"),
        (["build", "nothing.onnx"], 1, "nothing.onnx"),
        (["build", "small.onnx", "--gpu", "sm88"], 2, "unknown compute capability 88"),
        (["build", "small.onnx", "--int8"], 2, "--int8"),
        (["build", "small.onnx", "--fp16", "--bf16"], 2, "two precisions"),
        (["build", "a=small.onnx", "a=small.onnx"], 2, "given twice"),
        (["build", "small.onnx", "other.onnx"], 2, "names no graph"),
        (["run", "nothing.ryzen"], 1, "nothing.ryzen"),
        (["inspect"], 2, "no package is given"),
        (["export", "minilmm"], 2, "did you mean `minilm`?"),
        (["passes", "fodl"], 2, "did you mean `fold`?"),
        (["compare", "small.onnx", "--baseline", "small.onnx", "--as-given"], 2, "--as-given"),
    ],
)
def test_a_refusal_is_one_message(
    folder: Path, run_refused: Callable[[Path, list[str]], tuple[int, str]], arguments: list[str], exit_code: int, message: str
) -> None:
    before = sorted(path.name for path in folder.iterdir())
    actual_exit_code, stderr = run_refused(folder, arguments)
    assert actual_exit_code == exit_code
    assert message in stderr
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_refusal_with_json_is_printed_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "nothing.ryzen", "--json"]) == 1
    (error,) = json.loads(capsys.readouterr().out)["diagnostics"]
    assert set(error) == {"code", "severity", "message", "location", "hint"}
    assert (error["code"], error["severity"]) == ("package", "error")
    assert "nothing.ryzen" in error["message"]


def test_inspect_shows_the_contents_of_a_package(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(folder / "small.ryzen"), "--check"]) == 0
    output = capsys.readouterr().out
    for text in (
        "graph model, from small.onnx",
        "runs on the CPU",
        "engines/model.fold+attention+precision.to-fp16@tensorrt-rtx.sm89.plan",
        "digests are correct",
    ):
        assert text in output
    assert run(["inspect", str(folder / "small.ryzen"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["manifest"]["schema_version"] == 2


def test_a_manifest_has_the_fields_of_the_manifest_schema(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    manifest = json.loads((folder / "small.ryzen" / "manifest.json").read_text())
    properties = schema["$defs"]["Manifest"]["properties"]
    assert set(manifest) == set(properties)


def test_build_prints_json_to_stdout_and_messages_to_stderr(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["build", str(folder / "small.onnx"), "--gpu", "cpu,sm89", "--fp16", "--cache", str(folder / "cache"), "--json"]
    assert run(arguments) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["manifest"]["graphs"][0]["name"] == "model"
    assert "--fp16: adds the pass precision{to=fp16}" in output.err
    assert "taken from the cache" in output.err


def test_a_refused_target_exits_with_1_and_the_rest_is_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "build",
        str(folder / "small.onnx"),
        "-o",
        str(folder / "part.ryzen"),
        "--gpu",
        "cpu,h200",
        "--no-compare",
        "--no-cache",
    ]
    assert run(arguments) == 1
    assert "error: h200: refused by tensorrt for `model`: " in capsys.readouterr().err
    assert (folder / "part.ryzen" / "manifest.json").is_file()
    assert run([*arguments, "--allow-partial"]) == 0
    assert "refused" in capsys.readouterr().out


def test_a_build_with_a_refused_target_reports_what_was_built(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = folder / "reported.ryzen"
    arguments = ["build", str(folder / "small.onnx"), "-o", str(package), "--gpu", "cpu,h200", "--no-cache"]
    assert run(arguments) == 1
    output = capsys.readouterr()
    assert output.out.startswith(f"MET, INCOMPLETE: {package}, ")
    assert "meets the defaults of ryzen-compile" in output.out
    assert "h200" not in output.out
    assert "error: h200: refused by tensorrt for `model`: " in output.err
    assert f"{package}: the package was written, with its measurements, although the build failed" in output.err
    assert run([*arguments, "-q"]) == 1
    assert not capsys.readouterr().out
    assert run([*arguments, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["path"] == str(folder / "reported.rejected.ryzen"), "the first package is kept"
    assert report["manifest"]["graphs"][0]["variants"][0]["accuracy"][0]["met"]
    assert {item["code"] for item in report["diagnostics"] if item["severity"] == "error"} == {"target-refused"}


def test_the_exit_code_of_compare_is_its_verdict(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package, source = str(folder / "small.ryzen"), str(folder / "small.onnx")
    assert run(["compare", package, "--baseline", source]) == 0
    assert "MET" in capsys.readouterr().out
    other = tiny_models.write(folder / "other.onnx", seed=9)
    assert run(["compare", source, "--baseline", str(other), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["met"] is False
    assert run(["compare", source, "--baseline", source, "--max-abs", "0"]) == 0


def test_bisect_finds_the_pass_and_the_node(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(tiny_models.write(folder / "hot.onnx", scale=1e6))
    package = str(folder / "hot.ryzen")
    passes = "fold,precision{to=fp16,force=[first,scaled,relu,second]}"
    assert run(["build", source, "-o", package, "--gpu", "sm89", "-p", passes, "--no-compare", "--no-cache", "-q"]) == 0
    assert run(["compare", f"{package}@fold+precision", "--baseline", source, "--bisect", "-q"]) == 1
    output = capsys.readouterr().out
    assert "precision{to=fp16" in output
    assert "scaled" in output


def test_bisect_accepts_two_files_and_an_explicit_source(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package, source = str(folder / "small.ryzen"), str(folder / "small.onnx")
    other = str(tiny_models.write(folder / "scaled.onnx", scale=0.75))
    for arguments in ([source], [package], [package, "--source", source]):
        assert run(["compare", *arguments, "--baseline", other, "--bisect", "-q"]) == 1
        output = capsys.readouterr().out
        assert "to blame" in output
        assert "first at `" in output
        assert arguments == [source] or output.startswith("the source itself diverges from the baseline: ")


def test_bisect_requires_a_source_if_the_baseline_is_a_module(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package, source = str(folder / "small.ryzen"), str(folder / "small.onnx")
    module = folder / "twice.py"
    module.write_text(
        "import torch\n\nclass Twice(torch.nn.Module):\n    def forward(self, x):\n        return x * 2\n\nmake = Twice\n"
    )
    arguments = ["compare", package, "--baseline", f"{module}:make", "--bisect", "-q"]
    assert run(arguments) == 2
    output = capsys.readouterr()
    assert "add --source MODEL.onnx" in output.err
    assert output.out == ""
    assert run([*arguments, "--source", source]) == 1
    assert "the source itself diverges from the baseline" in capsys.readouterr().out
    assert run(["compare", source, "--baseline", f"{module}:make", "--bisect", "-q"]) == 2


def test_a_failed_bisection_keeps_the_verdict(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ShapeError("not possible")

    monkeypatch.setattr("ryzen_compile.numerics.compare_models.call_in_child", call_here)
    monkeypatch.setattr("ryzen_compile.numerics.bisect.find_divergence", fail)
    other = str(tiny_models.write(folder / "scaled.onnx", scale=0.75))
    assert run(["compare", other, "--baseline", str(folder / "small.onnx"), "--bisect", "-q"]) == 1
    assert "--bisect found nothing: not possible" in capsys.readouterr().err


def test_criteria_for_an_unknown_output_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, file = str(folder / "small.onnx"), folder / "criteria.toml"
    file.write_text("[fp32]\nmax_abs = 1\n[fp32.outputs.yy]\nmax_abs = 1\n")
    for candidate in (source, str(folder / "small.ryzen")):
        assert run(["compare", candidate, "--baseline", source, "--criteria", str(file)]) == 2
        assert "[fp32.outputs.yy] names no output: did you mean `y`?" in capsys.readouterr().err
    file.write_text("[fp32]\nmax_abs = 1\n[fp32.outputs.y]\nmax_abs = 1\n")
    assert run(["compare", source, "--baseline", source, "--criteria", str(file)]) == 0


def test_run_shows_and_saves_inputs_and_outputs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs_file, outputs_file = folder / "in.npz", folder / "out.npz"
    save_options = ["--save-inputs", str(inputs_file), "--save-outputs", str(outputs_file)]
    assert run(["run", str(folder / "small.ryzen"), "--shapes", "x:3x16", *save_options]) == 0
    assert "float32[3, 16]" in capsys.readouterr().out
    with np.load(inputs_file, allow_pickle=False) as inputs, np.load(outputs_file, allow_pickle=False) as outputs:
        y = outputs["y"]
        np.testing.assert_allclose(y, tiny_models.expected(inputs["x"]), rtol=1e-5, atol=1e-5)
    assert run(["run", str(folder / "small.ryzen"), "--data", str(inputs_file), "--json"]) == 0
    (summary,) = json.loads(capsys.readouterr().out)["outputs"]
    assert (summary["name"], summary["dtype"], summary["shape"], summary["not_finite"]) == ("y", "float32", [3, 16], 0)
    assert (summary["min"], summary["max"]) == pytest.approx((y.min(), y.max()))
    assert summary["mean"] == pytest.approx(y.mean(), rel=1e-4, abs=1e-6)


def test_bench_alternates_between_two_candidates(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [str(folder / "small.ryzen"), "--against", str(folder / "small.onnx")]
    arguments = ["bench", *models, "--duration", "0", "--warm-up", "0"]
    assert run([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["timings"]) == 2
    assert result["ratio"] > 0
    assert run(arguments) == 0
    assert "of the time of small.onnx" in capsys.readouterr().out


def test_verify_records_its_result_in_the_package(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package, copy = folder / "small.ryzen", folder / "copy.onnx"
    copy.write_bytes((folder / "small.onnx").read_bytes())

    def baselines() -> list[list[str]]:
        variants = json.loads((package / "manifest.json").read_text())["graphs"][0]["variants"]
        return [[accuracy["baseline"] for accuracy in variant["accuracy"]] for variant in variants]

    before = baselines()
    for _ in range(2):  # a repeated verification replaces its earlier result
        assert run(["verify", str(package), "--baseline", str(copy), "-q"]) == 0
        after = baselines()
        assert [recorded[:-1] for recorded in after] == before
        assert all(recorded[-1].startswith("copy.onnx") for recorded in after)
    assert run(["inspect", str(package), "--check", "-q"]) == 0


def test_explain_prints_pipelines_properties_and_refusals(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", str(folder / "small.onnx"), "--gpu", "cpu,sm89,h200", "--fp16"]) == 1
    output = capsys.readouterr().out
    for text in (
        "types/float32",
        "fold+attention+precision.to-fp16 for sm89",
        "the portable variant never uses half precision",
        "error: h200: refused by tensorrt",
    ):
        assert text in output
    assert run(["explain", str(folder / "small.onnx"), "--gpu", "cpu", "--json"]) == 0
    graph = json.loads(capsys.readouterr().out)["graphs"][0]
    assert graph["nodes"] == 5
    (fold,) = graph["pipelines"][0]["passes"]
    assert fold["estimate"]["nodes"] == -1
    assert set(fold["estimate"]) == {"nodes", "weight_bytes", "state_bytes", "reason"}


def test_rewrite_runs_passes_without_building(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folded = folder / "folded.onnx"
    assert run(["rewrite", str(folder / "small.onnx"), str(folded), "-p", "fold"]) == 0
    assert "5 -> 4 nodes" in capsys.readouterr().err
    assert run(["compare", str(folded), "--baseline", str(folder / "small.onnx"), "-q"]) == 0


def test_cache_explain_names_the_part_of_the_key_that_differs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = ["cache", "--folder", str(folder / "cache")]
    explain = ["explain", str(folder / "small.onnx"), "--gpu", "cpu,sm89", "--fp16"]
    assert run([*cache, *explain]) == 0
    assert capsys.readouterr().out.startswith("hit")
    assert run([*cache, *explain, "--builderOptimizationLevel", "1"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("miss")
    assert "builders.tensorrt-rtx on linux.options.builderOptimizationLevel: added: 1" in output
    assert run([*cache, "ls", "--json"]) == 0
    kinds = {entry["kind"] for entry in json.loads(capsys.readouterr().out)["entries"]}
    assert kinds == {"package", "engine", "variant", "comparison", "summary", "trial"}
    assert run([*cache, "ls"]) == 0
    assert "package model" in capsys.readouterr().out
    assert run([*cache, "stats"]) == 0
    assert "entries" in capsys.readouterr().out
    assert run([*cache, "gc", "--limit", "20"]) == 0
    assert run([*cache, "clear", "--json"]) == 0
    assert run([*cache, "ls"]) == 0
    assert "the cache is empty" in capsys.readouterr().out


def test_pack_and_unpack_preserve_every_byte(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package, tar, unpacked = folder / "small.ryzen", folder / "small.tar", folder / "unpacked.ryzen"
    assert run(["pack", str(package), str(tar)]) == 0
    assert run(["unpack", str(tar), str(unpacked), "-q"]) == 0
    assert run(["inspect", str(unpacked), "--check"]) == 0
    assert (package / "manifest.json").read_bytes() == (unpacked / "manifest.json").read_bytes()


def test_passes_targets_and_doctor_list_what_is_available(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["passes"]) == 0
    listed = capsys.readouterr().out
    for name in registry.names("passes"):
        assert name in listed
        assert run(["passes", name]) == 0
        assert capsys.readouterr().out.startswith(f"{name}\n")
    assert run(["targets"]) == 0
    assert "rtx4090" in capsys.readouterr().out
    assert run(["targets", "--json"]) == 0
    assert "tensorrt-rtx" in json.loads(capsys.readouterr().out)["builders"]["sm89"]
    assert run(["doctor"]) == 0
    output = capsys.readouterr().out
    assert "tensorrt: not available" in output
    assert "not yet executed" in output


def test_importing_the_tool_imports_no_framework() -> None:
    heavy = ("torch", "onnxruntime", "tensorrt", "tensorrt_rtx_bindings", "onnx_ir", "onnx", "numpy", "polygraphy", "rich")
    code = f"import sys, ryzen_compile, ryzen_compile.cli.main; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_installed_program_reports_an_unknown_command() -> None:
    program = Path(sys.executable).with_name("ryzen-compile")
    result = subprocess.run([program, "bild"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == "error: there is no command `bild` [usage]\nhint: did you mean `build`?\n"
