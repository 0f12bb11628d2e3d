"""What a user may ask for by mistake: numbers, places and names that are none; each gets one message and its exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import onnx
import psutil
import pytest
from support import tiny_models

from ryzen_compile.artifacts.package import layout
from ryzen_compile.artifacts.package.manifest import AccuracyRecord, EngineRecord, Manifest, Provenance
from ryzen_compile.artifacts.package.read import read_package
from ryzen_compile.cli.explain import _drop_zero_sizes
from ryzen_compile.cli.main import run
from ryzen_compile.cli.report import accuracy_warning

PROGRAM = str(Path(sys.executable).with_name("ryzen-compile"))
HUGE = "x:9999999999999x16"
BEYOND = "x:99999999999999999999x16"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("requests")
    tiny_models.write(place / "small.onnx")
    np.savez(place / "in.npz", x=np.zeros((2, 16), np.float32))
    (place / "notes.txt").write_text("mine")
    assert run(["build", str(place / "small.onnx"), "--gpu", "cpu,sm89", "--no-cache", "-q"]) == 0
    return place


def refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> tuple[int, str]:
    """Return the exit code and the one message of a request; nothing may be left in the folder."""
    monkeypatch.chdir(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code = run(words)
    told = capsys.readouterr()
    assert told.err.count("error: ") == 1
    assert "Traceback" not in told.err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    return code, told.err


@pytest.mark.parametrize(
    ("words", "code", "says"),
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
        (["build", "small.onnx", "--time-limit", "nan"], 2, "nan is not a finite number"),
        (["bench", "small.ryzen", "--duration", "inf"], 2, "inf is not a finite number"),
        (["export", "minilm", "--max-abs", "nan"], 2, "nan is not a finite number"),
        (["run", "small.ryzen", "--shapes", HUGE], 1, "takes 639999999999936 bytes"),
        (["bench", "small.ryzen", "--shapes", HUGE], 1, "takes 639999999999936 bytes"),
        (["build", "small.onnx", "-o", "o.ryzen", "--gpu", "cpu", "--no-cache", "--opt-shapes", HUGE], 1, "639999999999936"),
        (["run", "small.ryzen", "--shapes", BEYOND], 1, "an axis has at most 9223372036854775807 elements"),
        (["bench", "small.ryzen", "--shapes", BEYOND], 1, "an axis has at most"),
        (["build", "small.onnx", "--opt-shapes", BEYOND], 1, "an axis has at most"),
        (["explain", "small.onnx", "--maxShapes", f"x:{'9' * 5000}x16"], 1, "an axis has at most"),
        (["build", ""], 2, "`` names no file"),
        (["build", "."], 2, "`.` names no file"),
        (["build", "/"], 2, "`/` names no file"),
        (["explain", "one=/"], 2, "`/` names no file"),
        (["rewrite", "small.onnx", "notes.txt", "-p", "fold"], 1, "`notes.txt` is there and is not an ONNX file"),
        (["rewrite", "small.onnx", "small.onnx", "-p", "fold"], 1, "is the model itself"),
        (["export", "minilm", "notes.txt"], 1, "`notes.txt` is there and is not an ONNX file"),
        (["rewrite", "small.onnx", "o.onnx", "-p", "fold", "--backend", "tensorrtx"], 2, "did you mean `tensorrt"),
        (["run", "small.ryzen", "--shapes", "x:1x16", "--data", "in.npz"], 2, "--shapes is for seeded values"),
        (["bench", "small.ryzen", "--shapes", "x:1x16", "--data", "in.npz"], 2, "--shapes is for seeded values"),
        (["run", "small.ryzen", "--data", "nothing.npz"], 1, "there is no file `nothing.npz`"),
        (["cache", "--folder", "notes.txt", "ls"], 1, "`notes.txt` is not a folder"),
        (["cache", "--folder", "notes.txt", "stats"], 1, "`notes.txt` is not a folder"),
        (["cache", "--folder", "notes.txt", "clear"], 1, "`notes.txt` is not a folder"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], code: int, says: str
) -> None:
    got, told = refused(folder, monkeypatch, capsys, words)
    assert got == code
    assert says in told


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_model_is_not_rewritten_in_place_through_a_link(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], link: object
) -> None:
    tiny_models.write(tmp_path / "m.onnx")
    link(tmp_path / "m.onnx", tmp_path / "other.onnx")  # type: ignore[operator]
    for words in (["m.onnx", "other.onnx"], ["other.onnx", "m.onnx"]):
        code, told = refused(tmp_path, monkeypatch, capsys, ["rewrite", *words, "-p", "fold"])
        assert code == 1
        assert "is the model itself" in told


def test_an_earlier_output_of_rewrite_is_replaced(folder: Path, tmp_path: Path) -> None:
    for passes in ("none", "fold"):
        assert run(["rewrite", str(folder / "small.onnx"), str(tmp_path / "o.onnx"), "-p", passes, "-q"]) == 0
    assert len(onnx.load(tmp_path / "o.onnx").graph.node) == 4


def test_rewrite_runs_every_pass_that_is_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "half.onnx"
    assert run(["rewrite", str(folder / "small.onnx"), str(out), "-p", "precision{to=fp16}"]) == 0
    assert "`precision{to=fp16}`: the graph will hold half precision, which is not for CPUs" in capsys.readouterr().err
    assert {one.data_type for one in onnx.load(out).graph.initializer} >= {onnx.TensorProto.FLOAT16}


def test_unpack_names_its_own_argument_where_the_place_is_taken(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pack", str(folder / "small.ryzen"), str(folder / "p.tar"), "-q"]) == 0
    assert run(["unpack", str(folder / "p.tar"), str(folder / "notes.txt")]) == 1
    told = capsys.readouterr().err
    assert "is not a package" in told
    assert "--output" not in told
    assert f"ryzen-compile unpack {folder / 'p.tar'} PACKAGE" in told


@pytest.mark.parametrize(
    ("estimate", "told"),
    [
        ("0 softmaxes, in each attention about six nodes become one", "no change expected"),
        ("counted on a folded copy", "no change expected"),
        ("-0.0 MB of weights, counted on a folded copy", "no change expected"),
        ("-3 nodes, -0.0 MB of weights, counted on a folded copy", "-3 nodes, counted on a folded copy"),
        ("-0.0 MB of weights, 1028 bytes of weights change type", "1028 bytes of weights change type"),
        ("-10.0 MB of weights", "-10.0 MB of weights"),
    ],
)
def test_an_estimate_counts_something_or_says_that_nothing_changes(estimate: str, told: str) -> None:
    assert _drop_zero_sizes(estimate) == told


def test_a_file_that_cannot_be_reached_is_one_message(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["build", f"one={'a' * 5000}=b"]) == 1
    told = capsys.readouterr().err
    assert told.count("error: ") == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [["targets"], ["targets", "--json"], ["inspect", "nothing", "--json"], ["--help"]])
def test_a_full_disk_behind_stdout_is_one_message(words: list[str], unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [PROGRAM, *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert done.returncode == 1
    assert "error: standard output cannot be written: No space left on device\n" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_closed_stdout_is_one_message_and_a_closed_stderr_is_none() -> None:
    done = subprocess.run(["sh", "-c", f"'{PROGRAM}' targets >&-"], stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr.partition("\n")[0]) == (1, "error: standard output is closed")
    done = subprocess.run(["sh", "-c", f"'{PROGRAM}' targets 2>&-"], stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0
    assert "rtx4090" in done.stdout


def test_terminating_a_build_stops_its_worker_and_leaves_nothing(tmp_path: Path) -> None:
    tiny_models.write(tmp_path / "small.onnx")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    words = ["build", "small.onnx", "-o", "stopped.ryzen", "--gpu", "cpu,sm89", "--cache", "cache", "-q"]
    with subprocess.Popen(
        [PROGRAM, *words], cwd=tmp_path, stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(scratch)}
    ) as build:
        while not (workers := psutil.Process(build.pid).children()):
            assert build.poll() is None, "it ended before it had a worker"
            time.sleep(0.005)
        build.send_signal(signal.SIGTERM)
        _, told = build.communicate(timeout=60)
    assert build.returncode == 143
    assert "Traceback" not in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "scratch", "small.onnx"]
    assert {path.name for path in scratch.iterdir()} <= {".ses"}, "which is ONNX Runtime's, and stays after every process"
    assert psutil.wait_procs(workers, timeout=20)[1] == []


def _missing(manifest: Manifest, path: str) -> Manifest:
    """Return a manifest in which the variant at `path` missed its criteria."""
    miss = AccuracyRecord(
        candidate="it",
        baseline="source",
        machine="here",
        cases=1,
        criteria="strict.toml",
        metrics=(),
        met=False,
        timestamp="now",
    )
    graphs = tuple(
        msgspec.structs.replace(
            graph,
            variants=tuple(
                msgspec.structs.replace(one, accuracy=(*one.accuracy, miss)) if one.path == path else one
                for one in graph.variants
            ),
        )
        for graph in manifest.graphs
    )
    return msgspec.structs.replace(manifest, graphs=graphs)


def test_what_missed_its_criteria_says_so_when_it_is_run_or_timed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = read_package(folder / "small.ryzen")
    (portable,) = (one for one in package.manifest.graphs[0].variants if one.portable)
    timed = ["bench", str(package.path), "--duration", "0", "--warm-up", "0", "--iterations", "1"]
    for words in (["run", str(package.path)], timed):
        assert run(words) == 0
        assert "DOES NOT MEET" not in capsys.readouterr().err
    (package.path / layout.MANIFEST_NAME).write_bytes(layout.encode(_missing(package.manifest, portable.path)))
    try:
        for words in (["run", str(package.path)], timed):
            assert run(words) == 0
            assert f"warning: {portable.path} DOES NOT MEET strict.toml" in capsys.readouterr().err
    finally:
        (package.path / layout.MANIFEST_NAME).write_bytes(layout.encode(package.manifest))


def test_an_engine_answers_for_its_graph_and_for_itself(folder: Path) -> None:
    manifest = read_package(folder / "small.ryzen").manifest
    (engine,) = manifest.engines
    (variant,) = (one for one in manifest.graphs[0].variants if one.name == engine.variant)
    assert accuracy_warning(manifest, engine.path) is None
    assert "strict.toml" in (accuracy_warning(_missing(manifest, variant.path), engine.path) or "")
    evidence = Provenance(level="compared", machine="a GPU", message="MISSES strict.toml against source", timestamp="now")
    worse: EngineRecord = msgspec.structs.replace(engine, provenance=(*engine.provenance, evidence))
    says = accuracy_warning(msgspec.structs.replace(manifest, engines=(worse,)), engine.path)
    assert says is not None
    assert "strict.toml against source" in says
