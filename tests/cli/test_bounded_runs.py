"""Models that never end or exhaust the memory: commands that run them end within their limits, with one message."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import onnx
import psutil
import pytest

import ryzen_compile as rc

ENDLESS = """
<ir_version: 10, opset_import: ["" : 18]>
endless (float[2] x) => (float[2] y) <bool always = {1}> {
    y = Loop ("", always, x) <body = step (int64 i, bool c, float[2] a) => (bool next, float[2] b) {
        next = Identity (c)
        b = Identity (a)
    }>
}
"""
GROWING = """
<ir_version: 10, opset_import: ["" : 18]>
growing (float[2] x) => (float[2] y, float[k, 65536] all)
<bool always = {1}, float[1] one = {1}, int64[1] width = {65536}> {
    y, all = Loop ("", always, x) <body = step (int64 i, bool c, float[2] a) => (bool next, float[2] b, float[65536] row) {
        next = Identity (c)
        b = Identity (a)
        row = Expand (one, width)
    }>
}
"""


@pytest.fixture(params=[(ENDLESS, "endless"), (GROWING, "growing")], ids=["endless", "growing"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    text, name = request.param
    path = tmp_path / f"{name}.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    return path


def command(arguments: Sequence[str | Path], folder: Path) -> subprocess.Popen[str]:
    program = [str(Path(sys.executable).with_name("ryzen-compile")), *map(str, arguments)]
    temporary = folder / "temporary"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(program, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["build", "MODEL", "--gpu", "cpu", "--no-cache"],
        ["compare", "MODEL", "--baseline", "MODEL"],
        ["bench", "MODEL"],
        ["run", "MODEL"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_command_ends_at_its_limits_and_names_the_phase_and_the_shapes(
    model: Path, tmp_path: Path, arguments: list[str]
) -> None:
    limits = ["--time-limit", "3"] if model.stem == "endless" else ["--memory-limit", "1"]
    started = time.monotonic()
    process = command([model.name if text == "MODEL" else text for text in arguments] + limits, tmp_path)
    output, error = process.communicate(timeout=90)
    assert process.returncode == 1, output + error
    assert "Traceback" not in error
    failure = "exceeded its time limit of 3 s" if model.stem == "endless" else "exceeded its limit of 1.00 GB"
    assert f"{failure} while running" in error
    assert "x 2" in error
    assert time.monotonic() - started < 80
    assert not list((tmp_path / "temporary").iterdir())
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_verification_ends_at_its_limits(tmp_path: Path) -> None:
    path = tmp_path / "endless.onnx"
    onnx.save(onnx.parser.parse_model(ENDLESS), path)
    package = rc.build(path, gpu="cpu", compare=False, cache=False)
    process = command(["verify", package.path, "--baseline", path, "--time-limit", "3"], tmp_path)
    output, error = process.communicate(timeout=90)
    assert process.returncode == 1, output + error
    assert "the verification of" in error
    assert "exceeded its time limit of 3 s while running" in error
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_command_while_the_model_runs(number: signal.Signals, code: int, tmp_path: Path) -> None:
    path = tmp_path / "endless.onnx"
    onnx.save(onnx.parser.parse_model(ENDLESS), path)
    process = command(["compare", path, "--baseline", path], tmp_path)
    deadline = time.monotonic() + 60
    descendants: list[psutil.Process] = []
    while sum(child.cpu_times().user for child in descendants if child.is_running()) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.1)
        descendants = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, error = process.communicate(timeout=10)
    assert (process.returncode, error.strip().splitlines()[-1]) == (code, "stopped")
    _, alive = psutil.wait_procs(descendants, timeout=10)
    assert not alive
    assert not list((tmp_path / "temporary").iterdir())
