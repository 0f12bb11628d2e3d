"""Resources of a comparison: rows that are run alone, rows that are measured, and what is in memory at a time."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import psutil
import pytest

from ryzen_compile.errors import RyzenError
from ryzen_compile.numerics import onnx_candidates, output_files
from ryzen_compile.numerics.candidate import Candidate
from ryzen_compile.numerics.comparison import MAX_SINGLE_ROWS, Comparison, compare
from ryzen_compile.numerics.criteria import default_criteria
from ryzen_compile.numerics.grid import CaseSource
from ryzen_compile.numerics.output_files import OutputFiles
from ryzen_compile.numerics.stacked_metrics import OutputPair
from ryzen_compile.spec.interface import InputSpec, Interface, TensorSpec
from ryzen_compile.spec.profile import Profile

Arrays = dict[str, np.ndarray[Any, Any]]

INTERFACE = Interface(
    inputs=(InputSpec(name="x", dtype="float32", dims=("batch", 4)),),
    outputs=(TensorSpec(name="y", dtype="float32", dims=("batch", 4)),),
    batch="batch",
)
BATCH = 200
LARGE_BATCH = Profile(min={"x": (BATCH, 4)}, opt={"x": (BATCH, 4)}, max={"x": (BATCH, 4)})


class RecordedModel:
    """A model in NumPy that records the batch sizes of its runs, and how many models are open when it runs."""

    opened = 0

    def __init__(self, function: Callable[[Arrays], Arrays]) -> None:
        self.function = function
        self.batches: list[int] = []
        self.open_models: list[int] = []

    def candidate(self, interface: Interface = INTERFACE) -> Candidate:
        @contextmanager
        def open_run() -> Iterator[Callable[[Any], Any]]:
            RecordedModel.opened += 1
            yield self.run
            RecordedModel.opened -= 1

        return Candidate(name="model", description="model", interface=interface, open=open_run)

    def run(self, inputs: Arrays) -> Arrays:
        self.batches.append(len(inputs["x"]))
        self.open_models.append(RecordedModel.opened)
        return self.function(inputs)


def double(inputs: Arrays) -> Arrays:
    return {"y": inputs["x"] * 2}


def run(candidate: RecordedModel, baseline: RecordedModel, seed: int = 0) -> Comparison:
    source = CaseSource(profiles=[LARGE_BATCH], seed=seed)
    return compare(candidate.candidate(), baseline.candidate(), criteria=default_criteria(), case_source=source)


def test_one_model_is_open_at_a_time() -> None:
    candidate, baseline = RecordedModel(double), RecordedModel(double)
    assert run(candidate, baseline).met
    assert {*candidate.open_models, *baseline.open_models} == {1}


def test_a_limited_number_of_rows_runs_alone_and_a_note_says_so() -> None:
    candidate, baseline = RecordedModel(double), RecordedModel(double)
    result = run(candidate, baseline)
    assert candidate.batches == [BATCH, BATCH]
    assert sorted(baseline.batches) == [1] * MAX_SINGLE_ROWS + [BATCH, BATCH]
    assert f"{MAX_SINGLE_ROWS} of {BATCH} rows of a batch were compared with the same row alone" in result.accuracy.notes


def test_a_model_without_an_output_for_each_row_has_a_note_and_runs_no_row_alone() -> None:
    def total(inputs: Arrays) -> Arrays:
        return {"y": inputs["x"].sum(0, keepdims=True)}

    baseline = RecordedModel(total)
    result = run(RecordedModel(total), baseline)
    assert baseline.batches == [BATCH, BATCH]
    (note,) = (note for note in result.accuracy.notes if "rows" in note)
    assert note.endswith("no output has the batch dimension of the inputs")


def test_rows_of_an_output_with_an_undeclared_first_size_are_compared() -> None:
    """The tracer of PyTorch and Paddle give the sizes of outputs names of their own."""
    outputs = (TensorSpec(name="y", dtype="float32", dims=("y_dim_0", 4)),)
    interface = msgspec.structs.replace(INTERFACE, outputs=outputs)
    source = CaseSource(profiles=[LARGE_BATCH])

    def result_of(function: Callable[[Arrays], Arrays]) -> Comparison:
        candidate, baseline = (RecordedModel(model).candidate(interface) for model in (function, double))
        return compare(candidate, baseline, criteria=default_criteria(), case_source=source)

    def wrong_in_the_second_row(inputs: Arrays) -> Arrays:
        y = inputs["x"] * 2
        return {"y": y if np.ptp(inputs["x"], axis=0).any() else y + np.eye(len(y), 4, dtype=np.float32)}

    assert result_of(double).met
    unmet = {metric.name for metric in result_of(wrong_in_the_second_row).accuracy.metrics if not metric.met}
    assert "batch_invariance_max_abs" in unmet


def test_the_seed_selects_the_rows() -> None:
    def rows(seed: int) -> list[float]:
        seen: list[float] = []

        def record(inputs: Arrays) -> Arrays:
            if len(inputs["x"]) == 1:
                seen.append(float(inputs["x"][0, 0]))
            return double(inputs)

        source = CaseSource(
            profiles=[LARGE_BATCH], seed=seed, samples=[{"x": np.arange(4.0 * BATCH, dtype=np.float32).reshape(BATCH, 4)}]
        )
        candidates = RecordedModel(double).candidate(), RecordedModel(record).candidate()
        compare(*candidates, criteria=default_criteria(), case_source=source)
        return seen

    assert len(rows(0)) == MAX_SINGLE_ROWS
    assert rows(0) == rows(0)
    assert rows(0) != rows(1)


@pytest.mark.parametrize("row", [1, 57, BATCH - 1])
@pytest.mark.parametrize("value", [1e-1, np.nan, np.inf])
def test_the_row_that_differs_most_from_the_identical_row_0_is_found(row: int, value: float) -> None:
    def wrong(inputs: Arrays) -> Arrays:
        outputs = inputs["x"] * 2
        is_identical = (inputs["x"] == inputs["x"][0]).all()
        if is_identical:
            outputs += np.arange(len(outputs), dtype=np.float32)[:, None] * 1e-8
            outputs[row, 2] += value
        return {"y": outputs}

    result = run(RecordedModel(wrong), RecordedModel(double))
    assert not result.met
    problems = [metric.case for metric in result.accuracy.metrics if not metric.met and metric.name.startswith("batch")]
    assert all(f"row {row}" in case for case in problems)
    # The first fault is that against the baseline, the second one that against row 0.
    assert problems if np.isfinite(value) else " and 1 more" in result.accuracy.faults[0]


def test_large_outputs_are_in_files_until_they_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_files, "_MIN_FILE_BYTES", 1000)
    live: list[weakref.ref[Any]] = []

    def record(inputs: Arrays) -> Arrays:
        output = inputs["x"] * 2
        if len(output) == BATCH:
            live.append(weakref.ref(output))
            assert sum(reference() is not None for reference in live) <= 2
        return {"y": output}

    result = run(RecordedModel(double), RecordedModel(record))
    assert result.met
    assert not any(reference() is not None for reference in live)


def test_small_outputs_are_in_files_too_once_they_take_much_memory_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_files, "_MAX_MEMORY_BYTES", 1000)
    with OutputFiles() as files:
        kept = [files.keep({"y": np.full(100, index, np.float32)})["y"] for index in range(5)]
        assert [array.flags.owndata for array in kept] == [True] * 2 + [False] * 3
        assert [array[0] for array in kept] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "float8_e5m2", "bool", "int64"])
def test_an_array_in_a_file_is_equal(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ryzen_compile.spec.dtypes import numpy_dtype

    monkeypatch.setattr(output_files, "_MIN_FILE_BYTES", 0)
    array = np.arange(24).reshape(2, 3, 4).astype(numpy_dtype(dtype))
    with OutputFiles() as files:
        kept = files.keep({"y": array, "text": np.array(["a", "b"], object)})
        assert not kept["y"].flags.owndata
        assert kept["y"].dtype == array.dtype
        assert np.array_equal(kept["y"], array)
        assert kept["text"].tolist() == ["a", "b"]


def test_outputs_that_the_disk_cannot_hold_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_files, "_MIN_FILE_BYTES", 0)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with OutputFiles() as files, pytest.raises(RyzenError, match="does not fit in the 0.0 GB") as caught:
        files.keep({"y": np.zeros(100, np.float32)})
    assert caught.value.hint is not None
    assert "TMPDIR" in caught.value.hint


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_baseline_in_a_file_takes_no_memory_after_it_was_measured() -> None:
    elements = (32 << 20) // 4
    with OutputFiles() as files:
        baseline = files.keep({"y": np.ones((2, elements // 2), np.float32)})["y"]
        assert float(baseline.sum()) == elements
        before = psutil.Process().memory_info().shared
        assert OutputPair(np.ones_like(baseline), baseline).measure().faults == []
        assert before - psutil.Process().memory_info().shared > 30e6
        assert float(baseline.sum()) == elements
        del baseline


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("maps", [True, False])
def test_large_weights_are_mapped(maps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    header = '<ir_version: 10, opset_import: ["" : 21]>'
    model = onnx.parser.parse_model(header + "g (float[n, 512] x) => (float[n, 512] y) { y = MatMul (x, w) }")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.eye(512, dtype=np.float32), "w"))
    onnx.save(model, path, save_as_external_data=True, location="w.data")
    monkeypatch.setattr(onnx_candidates, "_MIN_MAPPED_BYTES", 4 * 512 * 512 + (0 if maps else 1))
    with onnx_candidates.onnx_candidate(path).open() as run_model:
        x = np.ones((2, 512), np.float32)
        assert np.array_equal(run_model({"x": x})["y"], x)
        assert (str(tmp_path / "w.data") in Path("/proc/self/maps").read_text()) == maps
