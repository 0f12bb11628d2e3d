"""The program: every verb on a real package, exit codes, and one clear message for whatever is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import tiny_models

from ryzen_compile import registry
from ryzen_compile.cli.main import _COMMANDS, run
from ryzen_compile.errors import ShapeError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("cli")
    tiny_models.write(place / "small.onnx")
    words = ["build", str(place / "small.onnx"), "--gpu", "cpu,sm89", "--fp16", "--cache", str(place / "cache"), "-q"]
    assert run(words) == 0
    return place


@pytest.mark.parametrize("verb", _COMMANDS)
def test_every_verb_has_a_page(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([verb, "--help"]) == 0
    assert "Usage: ryzen-compile" in capsys.readouterr().out


def test_the_first_page_lists_every_verb_with_its_caption(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    page = capsys.readouterr().out
    for verb in _COMMANDS:
        assert f"\n  {verb} " in page
    assert "Build a package of engines from an ONNX file" in page


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("ryzen-compile, version 0.")


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["biuld"], 2, "did you mean `build`?"),
        (["build"], 2, "Missing argument"),
        (["build", "x.onnx", "--saveEngine", "e"], 2, "give the package with -o"),
        (["build", "nothing.onnx"], 1, "nothing.onnx"),
        (["build", "small.onnx", "--gpu", "sm88"], 2, "no compute capability 88"),
        (["build", "small.onnx", "--int8"], 2, "--int8"),
        (["build", "small.onnx", "--fp16", "--bf16"], 2, "two precisions"),
        (["build", "a=small.onnx", "a=small.onnx"], 2, "given twice"),
        (["build", "small.onnx", "other.onnx"], 2, "names no graph"),
        (["run", "nothing.ryzen"], 1, "nothing.ryzen"),
        (["inspect"], 2, "no package is named"),
        (["export", "minilmm"], 2, "did you mean `minilm`?"),
        (["passes", "fodl"], 2, "did you mean `fold`?"),
        (["compare", "small.onnx", "--baseline", "small.onnx", "--as-given"], 2, "--as-given"),
    ],
)
def test_what_is_refused_is_refused_in_one_message(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], code: int, says: str
) -> None:
    monkeypatch.chdir(folder)
    before = sorted(path.name for path in folder.iterdir())
    assert run(words) == code
    told = capsys.readouterr()
    assert says in told.err
    assert told.err.startswith("error: ") or "\nerror: " in told.err
    assert "Traceback" not in told.err
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_refusal_in_json_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "nothing.ryzen", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["error"]["code"] == "package"
    assert "nothing.ryzen" in told["error"]["says"]


def test_inspect_shows_what_was_built(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(folder / "small.ryzen"), "--check"]) == 0
    page = capsys.readouterr().out
    for line in ("graph model, from small.onnx", "serves the CPU", "engines/model.tensorrt-rtx-sm89.plan", "digests are right"):
        assert line in page
    assert run(["inspect", str(folder / "small.ryzen"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["schema_version"] == 1


def test_the_schema_of_manifests_holds_for_a_manifest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    manifest = json.loads((folder / "small.ryzen" / "manifest.json").read_text())
    properties = schema["$defs"]["Manifest"]["properties"]
    assert set(manifest) == set(properties)


def test_build_says_json_on_stdout_and_talk_on_stderr(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["build", str(folder / "small.onnx"), "--gpu", "cpu,sm89", "--fp16", "--cache", str(folder / "cache"), "--json"]
    assert run(words) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["manifest"]["graphs"][0]["name"] == "model"
    assert "--fp16: adds the pass precision{to=fp16}" in told.err
    assert "taken from the cache" in told.err


def test_a_refused_target_ships_the_rest_and_exits_with_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "build",
        str(folder / "small.onnx"),
        "-o",
        str(folder / "part.ryzen"),
        "--gpu",
        "cpu,h200",
        "--no-compare",
        "--no-cache",
    ]
    assert run(words) == 1
    assert "`h200` was refused by tensorrt" in capsys.readouterr().err
    assert (folder / "part.ryzen" / "manifest.json").is_file()
    assert run([*words, "--allow-partial"]) == 0
    assert "refused" in capsys.readouterr().out


def test_compare_exits_by_its_verdict(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package, source = str(folder / "small.ryzen"), str(folder / "small.onnx")
    assert run(["compare", package, "--baseline", source]) == 0
    assert "MET" in capsys.readouterr().out
    other = tiny_models.write(folder / "other.onnx", seed=9)
    assert run(["compare", source, "--baseline", str(other), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["met"] is False
    assert run(["compare", source, "--baseline", source, "--max-abs", "0"]) == 0


def test_bisect_names_the_pass_and_the_node(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(tiny_models.write(folder / "hot.onnx", scale=1e6))
    package = str(folder / "hot.ryzen")
    plan = "fold,precision{to=fp16,force=[first,scaled,relu,second]}"
    assert run(["build", source, "-o", package, "--gpu", "sm89", "-p", plan, "--no-compare", "--no-cache", "-q"]) == 0
    assert run(["compare", f"{package}@fp16-tensorrt-rtx", "--baseline", source, "--bisect", "-q"]) == 1
    said = capsys.readouterr().out
    assert "precision{to=fp16" in said
    assert "scaled" in said


def test_bisect_of_two_files_and_of_another_source(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package, source = str(folder / "small.ryzen"), str(folder / "small.onnx")
    other = str(tiny_models.write(folder / "scaled.onnx", scale=0.75))
    for words in ([source], [package], [package, "--source", source]):
        assert run(["compare", *words, "--baseline", other, "--bisect", "-q"]) == 1
        said = capsys.readouterr().out
        assert "to blame" in said
        assert "first at `" in said
        assert words == [source] or said.startswith("the source itself parts from the baseline: ")


def test_bisect_with_a_module_as_baseline(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package, source = str(folder / "small.ryzen"), str(folder / "small.onnx")
    module = folder / "twice.py"
    module.write_text(
        "import torch\n\nclass Twice(torch.nn.Module):\n    def forward(self, x):\n        return x * 2\n\nmake = Twice\n"
    )
    words = ["compare", package, "--baseline", f"{module}:make", "--bisect", "-q"]
    assert run(words) == 2
    refused = capsys.readouterr()
    assert "add --source MODEL.onnx" in refused.err
    assert refused.out == ""
    assert run([*words, "--source", source]) == 1
    assert "the source itself parts from the baseline" in capsys.readouterr().out
    assert run(["compare", source, "--baseline", f"{module}:make", "--bisect", "-q"]) == 2


def test_a_bisection_that_fails_leaves_the_verdict(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ShapeError("no way")

    monkeypatch.setattr("ryzen_compile.numerics.bisect.find_divergence", fails)
    other = str(tiny_models.write(folder / "scaled.onnx", scale=0.75))
    assert run(["compare", other, "--baseline", str(folder / "small.onnx"), "--bisect", "-q"]) == 1
    assert "--bisect found nothing: no way" in capsys.readouterr().err


def test_limits_for_an_output_that_no_graph_has_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, file = str(folder / "small.onnx"), folder / "mine.toml"
    file.write_text("[fp32]\nmax_abs = 1\n[fp32.outputs.yy]\nmax_abs = 1\n")
    for one in (source, str(folder / "small.ryzen")):
        assert run(["compare", one, "--baseline", source, "--criteria", str(file)]) == 2
        assert "[fp32.outputs.yy] names no output: did you mean `y`?" in capsys.readouterr().err
    file.write_text("[fp32]\nmax_abs = 1\n[fp32.outputs.y]\nmax_abs = 1\n")
    assert run(["compare", source, "--baseline", source, "--criteria", str(file)]) == 0


def test_run_shows_and_saves_what_comes_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, got = folder / "in.npz", folder / "out.npz"
    saving = ["--save-inputs", str(given), "--save-outputs", str(got)]
    assert run(["run", str(folder / "small.ryzen"), "--shapes", "x:3x16", *saving]) == 0
    assert "float32[3, 16]" in capsys.readouterr().out
    with np.load(given, allow_pickle=False) as inputs, np.load(got, allow_pickle=False) as outputs:
        y = outputs["y"]
        np.testing.assert_allclose(y, tiny_models.expected(inputs["x"]), rtol=1e-5, atol=1e-5)
    assert run(["run", str(folder / "small.ryzen"), "--data", str(given), "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["outputs"]
    assert (told["name"], told["dtype"], told["shape"], told["not_finite"]) == ("y", "float32", [3, 16], 0)
    assert (told["min"], told["max"]) == pytest.approx((y.min(), y.max()))
    assert told["mean"] == pytest.approx(y.mean(), rel=1e-4, abs=1e-6)


def test_bench_times_in_turns(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", str(folder / "small.ryzen"), "--against", str(folder / "small.onnx"), "--duration", "0", "--warm-up", "0"]
    assert run([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["timings"]) == 2
    assert told["ratio"] > 0
    assert run(words) == 0
    assert "of the time of small.onnx" in capsys.readouterr().out


def test_verify_records_its_result_in_the_package(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = folder / "small.ryzen"
    before = json.loads((package / "manifest.json").read_text())
    assert run(["verify", str(package), "--baseline", str(folder / "small.onnx"), "-q"]) == 0
    after = json.loads((package / "manifest.json").read_text())
    count = [[len(one["accuracy"]) for one in manifest["graphs"][0]["variants"]] for manifest in (before, after)]
    assert count[1] == [number + 1 for number in count[0]]
    assert run(["inspect", str(package), "--check", "-q"]) == 0


def test_explain_prints_plan_facts_and_refusals(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", str(folder / "small.onnx"), "--gpu", "cpu,sm89,h200", "--fp16"]) == 1
    page = capsys.readouterr().out
    for line in (
        "types/float32",
        "fp16-tensorrt-rtx for sm89",
        "the portable graph never goes to half precision",
        "refused: h200",
    ):
        assert line in page
    assert run(["explain", str(folder / "small.onnx"), "--gpu", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["graphs"][0]["nodes"] == 5


def test_rewrite_runs_passes_without_building(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "folded.onnx"
    assert run(["rewrite", str(folder / "small.onnx"), str(out), "-p", "fold"]) == 0
    assert "5 -> 4 nodes" in capsys.readouterr().err
    assert run(["compare", str(out), "--baseline", str(folder / "small.onnx"), "-q"]) == 0


def test_cache_says_why_a_build_would_miss(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = ["cache", "--folder", str(folder / "cache")]
    same = ["explain", str(folder / "small.onnx"), "--gpu", "cpu,sm89", "--fp16"]
    assert run([*cache, *same]) == 0
    assert capsys.readouterr().out.startswith("hit")
    assert run([*cache, *same, "--builderOptimizationLevel", "1"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("miss")
    assert "builder tensorrt-rtx on linux: was" in told
    assert run([*cache, "ls", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2
    assert run([*cache, "stats"]) == 0
    assert "entries" in capsys.readouterr().out
    assert run([*cache, "gc", "--limit", "20"]) == 0
    assert run([*cache, "clear", "--json"]) == 0
    assert run([*cache, "ls"]) == 0
    assert "the cache is empty" in capsys.readouterr().out


def test_pack_and_unpack_keep_every_byte(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package, tar, back = folder / "small.ryzen", folder / "small.tar", folder / "back.ryzen"
    assert run(["pack", str(package), str(tar)]) == 0
    assert run(["unpack", str(tar), str(back), "-q"]) == 0
    assert run(["inspect", str(back), "--check"]) == 0
    assert (package / "manifest.json").read_bytes() == (back / "manifest.json").read_bytes()


def test_passes_and_targets_and_doctor_list_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["passes"]) == 0
    listed = capsys.readouterr().out
    for name in registry.names("passes"):
        assert name in listed
        assert run(["passes", name]) == 0
        assert f"{name} (version" in capsys.readouterr().out
    assert run(["targets"]) == 0
    assert "rtx4090" in capsys.readouterr().out
    assert run(["targets", "--json"]) == 0
    assert "tensorrt-rtx" in json.loads(capsys.readouterr().out)["builders"]["sm89"]
    assert run(["doctor"]) == 0
    told = capsys.readouterr().out
    assert "tensorrt: absent" in told
    assert "not yet executed" in told


def test_importing_the_tool_imports_no_framework() -> None:
    heavy = ("torch", "onnxruntime", "tensorrt", "tensorrt_rtx_bindings", "onnx_ir", "onnx", "numpy", "polygraphy", "rich")
    code = f"import sys, ryzen_compile, ryzen_compile.cli.main; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_installed_program_speaks_for_itself() -> None:
    program = Path(sys.executable).with_name("ryzen-compile")
    done = subprocess.run([program, "bild"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: there is no command `bild`\n\nhint: did you mean `build`?\n"
