"""Exports: what is written agrees with its module, and what does not is not written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from ryzen_compile.errors import AccuracyError, RyzenError, UsageError
from ryzen_compile.exporter import ExportReport, export
from ryzen_compile.ir.interface_metadata import interface_of

MODULES = str(Path(__file__).parents[1] / "support" / "torch_modules.py")
BOTH_DYNAMIC = {"input_ids": {0: "batch", 1: "seq"}, "attention_mask": {0: "batch", 1: "seq"}}


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExportReport]:
    path = tmp_path_factory.mktemp("tagger") / "tagger.onnx"
    return path, export(f"{MODULES}:tagger", path, dynamic=BOTH_DYNAMIC)


def test_a_callables_module_is_exported_with_dynamic_dimensions(tagger: tuple[Path, ExportReport]) -> None:
    path, report = tagger
    assert report.inputs == ("input_ids: int64[batch, seq]", "attention_mask: int64[batch, seq]")
    assert report.outputs == ("logits: float32[batch, seq, 3]", "pooled: float32[batch, 8]")
    feed = {"input_ids": np.ones((5, 9), np.int64), "attention_mask": np.ones((5, 9), np.int64)}
    assert onnxruntime.InferenceSession(path).run(["logits"], feed)[0].shape == (5, 9, 3)


def test_the_report_tells_strategy_cases_deviations_and_bounds(tagger: tuple[Path, ExportReport]) -> None:
    path, report = tagger
    assert report.strategy == "torch.export"
    assert report.opset == 23
    assert report.cases == 3
    assert {one.output for one in report.deviations} == {"logits", "pooled"}
    assert all(one.max_abs <= one.bound < 1e-3 for one in report.deviations)
    assert report.size_bytes == path.stat().st_size
    assert report.nodes == len(ir.load(path).graph)


def test_the_interface_goes_into_the_file(tagger: tuple[Path, ExportReport]) -> None:
    interface = interface_of(ir.load(tagger[0]))
    ids, mask = interface.inputs
    assert (ids.role, ids.low, ids.high) == ("ids", 0, 49)
    assert mask.role == "mask"
    assert interface.batch == "batch"
    assert interface.typical_sizes == {"batch": 2, "seq": 6}


def test_nothing_but_the_file_is_left(tagger: tuple[Path, ExportReport]) -> None:
    assert [file.name for file in tagger[0].parent.iterdir()] == ["tagger.onnx"]


def test_a_graph_that_does_something_else_is_refused_and_not_kept(tmp_path: Path) -> None:
    with pytest.raises(
        AccuracyError, match=r"output `output` of the exported graph differs from the module by .*sample 0, 2x6"
    ):
        export(f"{MODULES}:lying", tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_refused_export_leaves_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_text("earlier")
    with pytest.raises(AccuracyError):
        export(f"{MODULES}:lying", path)
    assert path.read_text() == "earlier"


def test_max_abs_decides_what_is_accepted(tmp_path: Path) -> None:
    report = export(f"{MODULES}:lying", tmp_path / "m.onnx", max_abs=10)
    assert report.deviations[0].bound == 10
    assert 0.1 < report.deviations[0].max_abs < 10


def test_a_branch_over_values_is_refused_by_its_line(tmp_path: Path) -> None:
    with pytest.raises(RyzenError, match=r"branches on values .*GuardOnDataDependentSymNode: .*\(torch_modules.py, line \d+\)"):
        export(f"{MODULES}:branching", tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_the_tracer_takes_over_and_is_named(tmp_path: Path) -> None:
    report = export(f"{MODULES}:untraceable", tmp_path / "m.onnx", dynamic={"x": {0: "n"}})
    assert report.strategy == "the tracer"
    assert report.opset == 20
    assert "NotImplementedError: not by torch.export (torch_modules.py, line" in report.notes[0]
    assert report.inputs == ("x: float32[n, 3]",)


def test_an_op_without_a_translation_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RyzenError, match="cannot be exported: torch.export: .*bessel_j0") as caught:
        export(f"{MODULES}:bessel", tmp_path / "m.onnx")
    assert "the older way fails too" in (caught.value.hint or "")
    assert capfd.readouterr() == ("", "")


def test_a_dimension_that_the_module_fixes_is_named(tmp_path: Path) -> None:
    with pytest.raises(RyzenError, match="the module fixes axis 0 of `x` at 2, which should be dynamic"):
        export(f"{MODULES}:fixing", tmp_path / "m.onnx", dynamic={"x": {0: "n"}})


def test_an_axis_that_other_inputs_share_is_named_with_theirs(tmp_path: Path) -> None:
    with pytest.raises(RyzenError, match="fixes axis 0 of `x` at 2") as caught:
        export(f"{MODULES}:joined_by_name", tmp_path / "m.onnx", dynamic={"x": {0: "n"}})
    assert "name its axis too: --dynamic y:0=n" in (caught.value.hint or "")
    report = export(f"{MODULES}:joined_by_name", tmp_path / "m.onnx", dynamic={"x": {0: "n"}, "y": {0: "n"}})
    assert report.inputs == ("x: float32[n, 6]", "y: float32[n, 6]")


def test_a_recipes_names_reach_the_graph_even_for_variadic_inputs(tmp_path: Path) -> None:
    report = export(f"{MODULES}:recipe", tmp_path / "m.onnx")
    assert report.inputs == tuple(f"in.{at}: float32[n, 4]" for at in range(3))
    model = ir.load(tmp_path / "m.onnx")
    assert [value.name for value in model.graph.outputs] == ["out.0", "out.1", "out.2"]
    assert all(one.bound == 1e-6 for one in report.deviations)


def test_a_recipe_declares_its_own_dynamic_dimensions(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the recipe `pair` declares its own"):
        export(f"{MODULES}:recipe", tmp_path / "m.onnx", dynamic={"in.0": {0: "n"}})


def test_one_name_for_two_sizes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="`n` is 2 and 6 in the sample inputs"):
        export(f"{MODULES}:tagger", tmp_path / "m.onnx", dynamic={"input_ids": {0: "n", 1: "n"}})


def test_an_input_that_is_not_there_is_refused_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the module has no input `input_id`\n\nhint: did you mean `input_ids`"):
        export(f"{MODULES}:tagger", tmp_path / "m.onnx", dynamic={"input_id": {0: "n"}})


def test_a_module_without_inputs_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="makes a module without sample inputs"):
        export(f"{MODULES}:module_alone", tmp_path / "m.onnx")


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a file in a folder that exists"):
        export(f"{MODULES}:tagger", tmp_path / "nowhere" / "m.onnx")
    with pytest.raises(UsageError, match="is not a file in a folder that exists"):
        export(f"{MODULES}:tagger", tmp_path)


@pytest.mark.parametrize(("asked", "written"), [(99, 18), (9, 18)])
def test_an_opset_that_torch_cannot_write_is_refused(tmp_path: Path, asked: int, written: int) -> None:
    with pytest.raises(RyzenError, match=f"at opset {written}, not at {asked}"):
        export((torch.nn.ReLU(), torch.rand(2, 3)), tmp_path / "m.onnx", opset=asked)
    assert not list(tmp_path.iterdir())


def test_an_opset_that_is_asked_for_is_written(tmp_path: Path) -> None:
    assert export((torch.nn.ReLU(), torch.rand(2, 3)), tmp_path / "m.onnx", opset=21).opset == 21
    assert ir.load(tmp_path / "m.onnx").opset_imports[""] == 21


def test_weights_too_large_for_one_file_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ryzen_compile.ir.save.MAX_INLINE_BYTES", 1000)
    report = export((torch.nn.Linear(64, 64), torch.rand(2, 64)), tmp_path / "m.onnx")
    sizes = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert sizes.keys() == {"m.onnx", "m.onnx.data"}
    assert sizes["m.onnx.data"] >= 64 * 64 * 4
    assert report.size_bytes == sum(sizes.values())
    assert onnxruntime.InferenceSession(tmp_path / "m.onnx").get_outputs()[0].shape == [2, 64]
