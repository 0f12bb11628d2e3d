"""Runs of a graph in a child process: arrays of every type and number, and failures of single samples."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from support.in_process import call_here
from support.stage_counts import StageCounts

from ryzen_compile.backends.onnxruntime import graph_runs as module
from ryzen_compile.backends.onnxruntime.graph_runs import graph_runs, load_arrays, save_arrays
from ryzen_compile.errors import BackendError
from ryzen_compile.processes import operation

SQUARE = '<ir_version: 10, opset_import: ["" : 21]> square (float[n, 2] x) => (float[n, 2] y) { y = Mul (x, x) }'


@pytest.mark.parametrize("min_mapped_bytes", [0, 1 << 20])
def test_arrays_of_every_type_are_kept(min_mapped_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MIN_MAPPED_BYTES", min_mapped_bytes)
    arrays = {
        "a/b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "half": np.ones(2, ml_dtypes.bfloat16),
        "eighth": np.ones(3, ml_dtypes.float8_e4m3fn),
        "text": np.array(["x", "yy"], object),
        "empty": np.zeros((0, 3)),
        "scalar": np.array(3, np.int64),
        "flag": np.array(True),
        "complex": np.ones(2, np.complex64),
    }
    save_arrays(arrays, tmp_path / "arrays")
    loaded = load_arrays(tmp_path / "arrays")
    assert list(loaded) == list(arrays)
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype
        assert loaded[name].shape == array.shape
        assert np.array_equal(loaded[name], array)


def test_thousands_of_arrays_need_no_open_files(tmp_path: Path) -> None:
    save_arrays({f"y{index}": np.array(float(index)) for index in range(3000)}, tmp_path / "arrays")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 50, hard))
    try:
        loaded = load_arrays(tmp_path / "arrays")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [float(array) for array in loaded.values()] == list(range(3000))


def test_a_sample_that_fails_does_not_prevent_the_others(tmp_path: Path) -> None:
    path = tmp_path / "square.onnx"
    onnx.save(onnx.parser.parse_model(SQUARE), path)
    samples = [{"x": np.full((1, 2), 3, np.float32)}, {"x": np.zeros((1, 5), np.float32)}, {"x": np.ones((2, 2), np.float32)}]
    progress = StageCounts()
    with graph_runs(path, samples, progress=progress) as runs:
        assert progress.texts() == ["run square.onnx: 3 of 3 samples"]
        assert [run.error is None for run in runs] == [True, False, True]
        assert runs[0].outputs()["y"].tolist() == [[9, 9]]
        assert "x" in (runs[1].error or "")
        with pytest.raises(BackendError):
            runs[1].outputs()
        assert runs[2].outputs()["y"].shape == (2, 2)


def test_the_operation_after_a_failed_sample_is_that_of_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "square.onnx"
    onnx.save(onnx.parser.parse_model(SQUARE), path)
    recorded: list[str] = []
    monkeypatch.setattr(operation, "_current", "")
    monkeypatch.setattr(operation, "_write", lambda: recorded.append(operation._current))
    monkeypatch.setattr(module, "call_in_child", call_here)
    with graph_runs(path, [{"x": np.zeros((1, 5), np.float32)}, {"x": np.ones((2, 2), np.float32)}]):
        pass
    assert recorded[-1] == ""
    assert "running square.onnx, on x 1x5" in recorded


def test_a_graph_that_cannot_be_loaded_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    with pytest.raises(BackendError, match=r"broken\.onnx"), graph_runs(tmp_path / "broken.onnx", ()):
        pass
