"""Tests of invalid requests: wrong numbers, paths and names; each has one message and its exit code."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import psutil
import pytest
from support import child_processes, tiny_models
from support.sample_package import with_unmet_criteria

from ryzen_compile.artifacts.package import layout
from ryzen_compile.artifacts.package.diagnostics import accuracy_warning
from ryzen_compile.artifacts.package.manifest import EngineRecord, Provenance
from ryzen_compile.artifacts.package.read import read_package
from ryzen_compile.cli.main import run

RunRefused = Callable[[Path, list[str]], tuple[int, str]]
PROGRAM = str(Path(sys.executable).with_name("ryzen-compile"))
HUGE_SHAPE = "x:9999999999999x16"
OVERFLOWING_SHAPE = "x:99999999999999999999x16"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("requests")
    tiny_models.write(path / "small.onnx")
    np.savez(path / "in.npz", x=np.zeros((2, 16), np.float32))
    (path / "notes.txt").write_text("notes")
    assert run(["build", str(path / "small.onnx"), "--gpu", "cpu,sm89", "--no-cache", "-q"]) == 0
    return path


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["run", "small.ryzen", "--seed", "-1"], 2, "-1 is not in the range"),
        (["build", "small.onnx", "--seed", "-1"], 2, "-1 is not in the range"),
        (["compare", "small.onnx", "--baseline", "small.onnx", "--seed", "-1"], 2, "-1 is not in the range"),
        (["bench", "small.ryzen", "--seed", "-1"], 2, "-1 is not in the range"),
        (["export", "minilm", "--seed", "-1"], 2, "-1 is not in the range"),
        (["verify", "small.ryzen", "--seed", str(2**32)], 2, "is not in the range"),
        (["rewrite", "small.onnx", "o.onnx", "-p", "fold", "--seed", "-1"], 2, "-1 is not in the range"),
        (["cache", "gc", "--limit", "nan"], 2, "nan is not a finite number"),
        (["cache", "gc", "--limit", "inf"], 2, "is not in the range"),
        (["cache", "gc", "--limit", "-1"], 2, "is not in the range"),
        (["build", "small.onnx", "--memory-limit", "nan"], 2, "nan is not a finite number"),
        (["build", "small.onnx", "--memory-limit", "inf"], 2, "is not in the range"),
        (["build", "small.onnx", "--memory-limit", "2GB/0"], 2, "'2GB/0' is not a valid float range"),
        (["build", "small.onnx", "--memory-limit", "0"], 2, "is not in the range"),
        (["build", "small.onnx", "--time-limit", "nan"], 2, "nan is not a finite number"),
        (["bench", "small.ryzen", "--duration", "inf"], 2, "inf is not a finite number"),
        (["export", "minilm", "--max-abs", "nan"], 2, "nan is not a finite number"),
        (["run", "small.ryzen", "--shapes", HUGE_SHAPE], 1, "need 639999999999936 bytes"),
        (["bench", "small.ryzen", "--shapes", HUGE_SHAPE], 1, "need 639999999999936 bytes"),
        (
            ["build", "small.onnx", "-o", "o.ryzen", "--gpu", "cpu", "--no-cache", "--opt-shapes", HUGE_SHAPE],
            1,
            "639999999999936",
        ),
        (["run", "small.ryzen", "--shapes", OVERFLOWING_SHAPE], 1, "an axis has at most 9223372036854775807 elements"),
        (["bench", "small.ryzen", "--shapes", OVERFLOWING_SHAPE], 1, "an axis has at most"),
        (["build", "small.onnx", "--opt-shapes", OVERFLOWING_SHAPE], 1, "an axis has at most"),
        (["explain", "small.onnx", "--maxShapes", f"x:{'9' * 5000}x16"], 1, "an axis has at most"),
        (["build", ""], 2, "`` names no file"),
        (["build", "."], 2, "`.` names no file"),
        (["build", "/"], 2, "`/` names no file"),
        (["explain", "one=/"], 2, "`/` names no file"),
        (["rewrite", "small.onnx", "notes.txt", "-p", "fold"], 1, "`notes.txt` exists and is not an ONNX file"),
        (["rewrite", "small.onnx", "small.onnx", "-p", "fold"], 1, "is the model itself"),
        (["export", "minilm", "notes.txt"], 1, "`notes.txt` exists and is not an ONNX file"),
        (["rewrite", "small.onnx", "o.onnx", "-p", "fold", "--backend", "tensorrtx"], 2, "did you mean `tensorrt"),
        (["rewrite", "small.onnx", "o.onnx", "-p", "kv-static"], 2, "the option `capacity` of `kv-static` is required"),
        (["run", "small.ryzen", "--shapes", "x:1x16", "--data", "in.npz"], 2, "--shapes is for random values"),
        (["bench", "small.ryzen", "--shapes", "x:1x16", "--data", "in.npz"], 2, "--shapes is for random values"),
        (["run", "small.ryzen", "--data", "nothing.npz"], 1, "there is no file `nothing.npz`"),
        (["cache", "--folder", "notes.txt", "ls"], 1, "`notes.txt` is not a folder"),
        (["cache", "--folder", "notes.txt", "stats"], 1, "`notes.txt` is not a folder"),
        (["cache", "--folder", "notes.txt", "clear"], 1, "`notes.txt` is not a folder"),
    ],
)
def test_an_invalid_request_is_refused(
    folder: Path, run_refused: RunRefused, arguments: list[str], exit_code: int, message: str
) -> None:
    actual_exit_code, stderr = run_refused(folder, arguments)
    assert actual_exit_code == exit_code
    assert message in stderr


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_model_is_not_rewritten_in_place_through_a_link(tmp_path: Path, run_refused: RunRefused, link: object) -> None:
    tiny_models.write(tmp_path / "m.onnx")
    link(tmp_path / "m.onnx", tmp_path / "other.onnx")  # type: ignore[operator]
    for paths in (["m.onnx", "other.onnx"], ["other.onnx", "m.onnx"]):
        exit_code, stderr = run_refused(tmp_path, ["rewrite", *paths, "-p", "fold"])
        assert exit_code == 1
        assert "is the model itself" in stderr


def test_an_earlier_output_of_rewrite_is_replaced(folder: Path, tmp_path: Path) -> None:
    for passes in ("none", "fold"):
        assert run(["rewrite", str(folder / "small.onnx"), str(tmp_path / "o.onnx"), "-p", passes, "-q"]) == 0
    assert len(onnx.load(tmp_path / "o.onnx").graph.node) == 4


def test_rewrite_runs_every_given_pass(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "half.onnx"
    assert run(["rewrite", str(folder / "small.onnx"), str(output), "-p", "precision{to=fp16}"]) == 0
    assert "`precision{to=fp16}`: the graph uses half precision, which is not intended for CPUs" in capsys.readouterr().err
    assert {initializer.data_type for initializer in onnx.load(output).graph.initializer} >= {onnx.TensorProto.FLOAT16}


def test_unpack_names_its_own_argument_if_the_path_exists(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pack", str(folder / "small.ryzen"), str(folder / "p.tar"), "-q"]) == 0
    assert run(["unpack", str(folder / "p.tar"), str(folder / "notes.txt")]) == 1
    stderr = capsys.readouterr().err
    assert "is not a package" in stderr
    assert "--output" not in stderr
    assert f"ryzen-compile unpack {folder / 'p.tar'} PACKAGE" in stderr
    assert "[output-exists]" in stderr


def test_an_unreachable_file_is_one_message(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["build", f"one={'a' * 5000}=b"]) == 1
    assert capsys.readouterr().err.count("error: ") == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["targets"], ["targets", "--json"], ["inspect", "nothing", "--json"], ["--help"]])
def test_a_full_disk_behind_stdout_is_one_message(arguments: list[str], unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [PROGRAM, *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert result.returncode == 1
    assert "error: standard output cannot be written: No space left on device [refused]\n" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr


def test_a_closed_stdout_is_one_message_and_a_closed_stderr_is_no_error() -> None:
    result = subprocess.run(["sh", "-c", f"'{PROGRAM}' targets >&-"], stderr=subprocess.PIPE, text=True, check=False)
    assert (result.returncode, result.stderr.partition("\n")[0]) == (1, "error: standard output is closed [refused]")
    result = subprocess.run(["sh", "-c", f"'{PROGRAM}' targets 2>&-"], stdout=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 0
    assert "rtx4090" in result.stdout


def test_terminating_a_build_stops_its_worker_and_leaves_no_file(tmp_path: Path) -> None:
    tiny_models.write(tmp_path / "small.onnx")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    arguments = ["build", "small.onnx", "-o", "stopped.ryzen", "--gpu", "cpu,sm89", "--cache", "cache", "-q"]
    with subprocess.Popen(
        [PROGRAM, *arguments], cwd=tmp_path, stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(scratch)}
    ) as build:
        stderr, workers = child_processes.interrupt_build(build, signal.SIGTERM)
    assert build.returncode == 143
    assert "Traceback" not in stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "scratch", "small.onnx"]
    assert {path.name for path in scratch.iterdir()} <= {".ses"}, "ONNX Runtime leaves `.ses` after every process"
    assert psutil.wait_procs(workers, timeout=20)[1] == []


def test_run_and_bench_warn_if_criteria_are_not_met(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = read_package(folder / "small.ryzen")
    (portable,) = (variant for variant in package.manifest.graphs[0].variants if variant.portable)
    bench = ["bench", str(package.path), "--duration", "0", "--warm-up", "0", "--iterations", "1"]
    for arguments in (["run", str(package.path)], bench):
        assert run(arguments) == 0
        assert "DOES NOT MEET" not in capsys.readouterr().err
    (package.path / layout.MANIFEST_NAME).write_bytes(layout.encode(with_unmet_criteria(package.manifest, portable.path)))
    try:
        for arguments in (["run", str(package.path)], bench):
            assert run(arguments) == 0
            assert f"warning: {portable.path}: DOES NOT MEET strict.toml" in capsys.readouterr().err
    finally:
        (package.path / layout.MANIFEST_NAME).write_bytes(layout.encode(package.manifest))


def test_the_warning_for_an_engine_covers_its_variant_and_itself(folder: Path) -> None:
    manifest = read_package(folder / "small.ryzen").manifest
    (engine,) = manifest.engines
    (variant,) = (variant for variant in manifest.graphs[0].variants if variant.name == engine.variant)
    assert accuracy_warning(manifest, engine.path) is None
    assert "strict.toml" in str(accuracy_warning(with_unmet_criteria(manifest, variant.path), engine.path))
    provenance = Provenance(level="compared", machine="a GPU", message="strict.toml against source", met=False, timestamp="now")
    unmet_engine: EngineRecord = msgspec.structs.replace(engine, provenance=(*engine.provenance, provenance))
    warning = accuracy_warning(msgspec.structs.replace(manifest, engines=(unmet_engine,)), engine.path)
    assert warning is not None
    assert "DOES NOT MEET strict.toml against source" in warning.message
    met_engine = msgspec.structs.replace(engine, provenance=(msgspec.structs.replace(provenance, met=True),))
    assert accuracy_warning(msgspec.structs.replace(manifest, engines=(met_engine,)), engine.path) is None


@pytest.mark.parametrize(
    ("exception", "exit_code", "message"),
    [
        (
            TypeError("'int' object is not\niterable"),
            70,
            "internal error in targets: TypeError: 'int' object is not iterable [internal",
        ),
        (MemoryError(), 1, "the memory does not suffice"),
        (RecursionError("maximum recursion depth exceeded"), 1, "nested too deeply"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
        (OSError(errno.EIO, "Input/output error"), 70, "internal error in targets: OSError"),
    ],
)
def test_an_unexpected_exception_is_one_message(
    tmp_path: Path, run_refused: RunRefused, monkeypatch: pytest.MonkeyPatch, exception: Exception, exit_code: int, message: str
) -> None:
    def fail(*_: object) -> None:
        raise exception

    monkeypatch.setattr("ryzen_compile.registry.broken_members", fail)
    actual_exit_code, stderr = run_refused(tmp_path, ["targets"])
    assert actual_exit_code == exit_code
    assert message in stderr


@pytest.mark.parametrize("exception", [KeyError("name"), OSError(errno.EIO, "Input/output error")])
def test_verbose_output_has_the_trace_of_an_unexpected_exception(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], exception: Exception
) -> None:
    def fail(*_: object) -> None:
        raise exception

    monkeypatch.setattr("ryzen_compile.registry.broken_members", fail)
    assert run(["targets", "-v"]) == 70
    stderr = capsys.readouterr().err
    assert "    raise exception\n" in stderr
    assert stderr.rstrip().splitlines()[-1] == "hint: please report it, with the output of the same command with -v"
    assert run(["targets", "--json"]) == 70
    (diagnostic,) = msgspec.json.decode(capsys.readouterr().out)["diagnostics"]
    assert diagnostic["code"] == "internal-error"
