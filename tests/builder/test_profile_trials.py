"""Tests of derived profiles: they hold shapes with which the source runs, and a source that does not run is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from support.cache_entries import RecordingProgress
from support.stage_counts import StageCounts

import ryzen_compile as rc
from ryzen_compile.data.synthetic import synthesize
from ryzen_compile.errors import BackendError
from ryzen_compile.ir.analysis.working_set import WorkingSet
from ryzen_compile.ir.load import load
from ryzen_compile.progress import StageItems


def write(folder: Path, body: str, output: str = "float[b, n] y", inputs: str = "float[b, n] x") -> Path:
    text = f'<ir_version: 10, opset_import: ["" : 21]> g ({inputs}) => ({output}) {{ {body} }}'
    onnx.save(onnx.parser.parse_model(text), folder / "model.onnx")
    return folder / "model.onnx"


TABLE = """
    length = Shape <start = 1, end = 2> (x)
    zero = Constant <value_int = 0> ()  one = Constant <value_int = 1> ()
    end = Squeeze (length)  positions = Range (zero, end, one)
    value = Constant <value_floats = [0.5]> ()  rows = Constant <value_ints = [64]> ()
    table = Expand (value, rows)  bias = Gather (table, positions)  y = Add (x, bias) """


def test_a_derived_maximum_ends_where_the_source_fails(tmp_path: Path) -> None:
    progress = StageCounts()
    package = rc.build(write(tmp_path, TABLE), gpu="cpu", cache=tmp_path / "cache", progress=progress)
    (profile,) = package.manifest.graphs[0].profiles
    assert (profile.min["x"], profile.opt["x"], profile.max["x"]) == ((1, 1), (1, 64), (8, 64))
    assert any("`n` ends at 64: above it, " in line for line in progress.lines)
    trial = progress.stages[0]
    assert (trial.title, trial.items) == ("try the derived shapes of model.onnx", StageItems("runs"))
    assert trial.done > 5
    again = rc.build(write(tmp_path, TABLE), gpu="cpu", cache=tmp_path / "cache", progress=progress)
    assert again.manifest.graphs[0].profiles == (profile,)


def test_a_batch_that_the_source_fixes_bounds_the_profile(tmp_path: Path) -> None:
    body = "s = Constant <value_ints = [1, 2, 3]> ()  r = Reshape (x, s)  t = Shape (x)  y = Reshape (r, t)"
    progress = RecordingProgress()
    package = rc.build(write(tmp_path, body, "float[b, 6] y", "float[b, 6] x"), gpu="cpu", cache=False, progress=progress)
    (profile,) = package.manifest.graphs[0].profiles
    assert profile.max["x"] == (1, 6)
    assert any("`b` ends at 1: above it, Reshape" in line for line in progress.lines)


def test_a_derived_minimum_starts_where_the_source_runs(tmp_path: Path) -> None:
    body = "w = Constant <value = float[1, 1, 10] {1, 1, 1, 1, 1, 1, 1, 1, 1, 1}> ()  y = Conv (x, w)"
    package = rc.build(write(tmp_path, body, "float[b, 1, m] y", "float[b, 1, n] x"), gpu="cpu", cache=False)
    (profile,) = package.manifest.graphs[0].profiles
    assert profile.min["x"] == (1, 1, 10)
    assert profile.max["x"] == (8, 1, 512)


def test_derived_shapes_are_limited_by_the_memory_of_one_node(tmp_path: Path) -> None:
    path = write(tmp_path, "y = Relu (x)", "float[a, b, c, d] y", "float[a, b, c, d] x")
    assert WorkingSet(load(path)).nbytes({"a": 2, "b": 3, "c": 5, "d": 7}) == 2 * 3 * 5 * 7 * 4 * 2
    progress = RecordingProgress()
    package = rc.build(path, gpu="cpu", compare=False, cache=False, progress=progress)
    sizes = package.manifest.graphs[0].profiles[0].max["x"]
    assert 2e8 < sizes[0] * sizes[1] * sizes[2] * sizes[3] * 8 <= 1e9
    assert any("the tensors of one node take" in line for line in progress.lines)


@pytest.mark.parametrize("shapes", [{}, {"min_shapes": "x:1x2", "max_shapes": "x:2x5"}])
def test_a_source_that_does_not_run_is_named_in_place_of_the_variant(tmp_path: Path, shapes: dict[str, str]) -> None:
    body = "s = Constant <value_ints = [7777]> ()  y = Reshape (x, s)"
    with pytest.raises(BackendError, match="the source `model.onnx` itself fails at the min shapes x:1x") as caught:
        rc.build(write(tmp_path, body, "float[k] y"), gpu="cpu", cache=False, **shapes)
    (problem, *_) = caught.value.diagnostics
    form = "x:2x5" if shapes else "x:1x128"
    assert problem.hint == (
        f"give --min-shapes, --opt-shapes and --max-shapes at which the source runs, in the form {form}, or valid inputs with "
        "--data"
    )


def test_a_static_source_that_does_not_run_needs_other_values(tmp_path: Path) -> None:
    body = "s = Constant <value_ints = [7777]> ()  y = Reshape (x, s)"
    with pytest.raises(BackendError, match="the source `model.onnx` itself fails") as caught:
        rc.build(write(tmp_path, body, "float[k] y", "float[2, 3] x"), gpu="cpu", cache=False)
    assert caught.value.diagnostics[0].hint == "give valid inputs with --data"


def test_the_minimum_is_derived_if_only_a_maximum_is_given(tmp_path: Path) -> None:
    body = "w = Constant <value = float[1, 1, 10] {1, 1, 1, 1, 1, 1, 1, 1, 1, 1}> ()  y = Conv (x, w)"
    path = write(tmp_path, body, "float[b, 1, m] y", "float[b, 1, n] x")
    progress = RecordingProgress()
    package = rc.build(path, gpu="cpu", max_shapes={"x": (4, 1, 40)}, cache=False, progress=progress)
    (profile,) = package.manifest.graphs[0].profiles
    assert (profile.min["x"], profile.opt["x"], profile.max["x"]) == ((1, 1, 10), (1, 1, 40), (4, 1, 40))
    assert progress.lines[:2] == [
        "model: derived shapes: min x:1x1x10  opt x:1x1x40  max x:4x1x40",
        next(line for line in progress.lines if line.startswith("model: `n` starts at 10: below it, ")),
    ]
    static = rc.build(path, tmp_path / "s.ryzen", gpu="cpu", opt_shapes={"x": (4, 1, 40)}, cache=False)
    assert static.manifest.graphs[0].profiles[0].min["x"] == (4, 1, 40)


RATE_BRANCHES = """
    rate16 = Constant <value = int64 {16000}> ()  is16 = Equal (rate, rate16)
    w = Constant <value = float[1, 1, 10] {1, 1, 1, 1, 1, 1, 1, 1, 1, 1}> ()  one = Constant <value_ints = [1]> ()
    lengths = Shape <start = 1, end = 2> (x)  end = Squeeze (lengths)
    zero = Constant <value_int = 0> ()  step = Constant <value_int = 1> ()  positions = Range (zero, end, step)
    half = Constant <value_floats = [0.5]> ()  rows = Constant <value_ints = [40]> ()  table = Expand (half, rows)
    r = If (is16) <
        then_branch = t () => (float[a, 1, 1] p) {
            x3 = Unsqueeze (x, one)  c = Conv (x3, w)  last = Constant <value_ints = [2]> ()  p = ReduceMean (c, last) },
        else_branch = e () => (float[a, 1, 1] q) {
            bias = Gather (table, positions)  s = Add (x, bias)  axes = Constant <value_ints = [1]> ()
            m = ReduceMean (s, axes)  q = Unsqueeze (m, axes) }>
    rt = Transpose <perm = [1, 0, 2]> (r)  y = Concat <axis = 2> (rt, state) """
"""Two branches that run from 10 and up to 40 elements, and a state whose second axis is the batch."""


def write_rate_branches(folder: Path) -> Path:
    return write(folder, RATE_BRANCHES, "float[1, c, 5] y", "float[a, n] x, float[1, b, 4] state, int64 rate")


def test_derived_shapes_are_those_with_which_every_branch_runs(tmp_path: Path) -> None:
    progress = RecordingProgress()
    package = rc.build(write_rate_branches(tmp_path), gpu="cpu", cache=tmp_path / "cache", progress=progress)
    (graph,) = package.manifest.graphs
    (profile,) = graph.profiles
    assert (profile.min["x"], profile.opt["x"], profile.max["x"]) == ((1, 10), (1, 32), (8, 40))
    assert (profile.min["state"], profile.max["state"]) == ((1, 1, 4), (1, 8, 4)), "the sizes that must be equal are"
    assert any(line.startswith("model: `b` ends at 8: above it, it must equal `a`") for line in progress.lines)
    (accuracy,) = graph.variants[0].accuracy
    assert accuracy.met
    assert accuracy.not_run == ()


def test_random_values_are_those_with_which_the_source_runs_at_the_given_shapes(tmp_path: Path) -> None:
    progress = RecordingProgress()
    path = write_rate_branches(tmp_path)
    shapes = "x:1x100,state:1x1x4"
    package = rc.build(path, gpu="cpu", opt_shapes=shapes, cache=tmp_path / "cache", progress=progress)
    assert any(line.startswith("model: random values of `rate` are all 16000: with others, ") for line in progress.lines)
    (graph,) = package.manifest.graphs
    assert (graph.interface.input("rate").low, graph.interface.input("rate").high) == (16000, 16000)
    assert graph.variants[0].accuracy[0].met
    inputs = synthesize(graph.interface, graph.profiles[0].opt, seed=0, rows="mixed")
    assert inputs["rate"] == 16000


def test_random_values_with_which_the_source_runs_are_kept(tmp_path: Path) -> None:
    package = rc.build(write_rate_branches(tmp_path), gpu="cpu", opt_shapes="x:1x20,state:1x1x4", cache=False)
    (graph,) = package.manifest.graphs
    assert (graph.interface.input("rate").low, graph.interface.input("rate").high) == (None, None)
    assert graph.variants[0].accuracy[0].not_run == ()


def test_shapes_of_samples_are_tried_if_the_source_does_not_run_with_the_typical_ones(tmp_path: Path) -> None:
    data = tmp_path / "samples.npz"
    np.savez(data, x=np.ones((1, 3), np.float32), state=np.ones((1, 1, 4), np.float32), rate=np.array(8000))
    package = rc.build(write_rate_branches(tmp_path), gpu="cpu", data=str(data), cache=False)
    (graph,) = package.manifest.graphs
    assert (graph.profiles[0].min["x"], graph.profiles[0].opt["x"], graph.profiles[0].max["x"]) == ((1, 1), (1, 3), (8, 40))
    assert graph.interface.input("rate").low is None
