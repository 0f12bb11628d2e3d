"""Tests of export: a file is written if and only if its outputs match those of the module."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from support import tiny_models
from support.stage_counts import StageCounts

from ryzen_compile.data.synthetic import synthesize
from ryzen_compile.errors import AccuracyError, RyzenError, UsageError
from ryzen_compile.exporter import ExportReport, export, parse_dynamic
from ryzen_compile.exporter.export_spec import complete_interface, make_export_spec
from ryzen_compile.exporter.validation import sizes_hint
from ryzen_compile.ir.interface_metadata import METADATA_KEY, interface_of
from ryzen_compile.spec.interface import Interface
from ryzen_compile.spec.profile import derive_profile

MODULES = str(Path(__file__).parents[1] / "support" / "torch_modules.py")
BOTH_DYNAMIC = {"input_ids": {0: "batch", 1: "seq"}, "attention_mask": {0: "batch", 1: "seq"}}


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExportReport]:
    path = tmp_path_factory.mktemp("tagger") / "tagger.onnx"
    return path, export(f"{MODULES}:tagger", path, dynamic=BOTH_DYNAMIC)


def test_module_of_a_callable_is_exported_with_dynamic_dimensions(tagger: tuple[Path, ExportReport]) -> None:
    path, report = tagger
    assert report.inputs == ("input_ids: int64[batch, seq]", "attention_mask: int64[batch, seq]")
    assert report.outputs == ("logits: float32[batch, seq, 3]", "pooled: float32[batch, 8]")
    inputs = {"input_ids": np.ones((5, 9), np.int64), "attention_mask": np.ones((5, 9), np.int64)}
    assert onnxruntime.InferenceSession(path).run(["logits"], inputs)[0].shape == (5, 9, 3)


def test_report_has_strategy_cases_deviations_and_bounds(tagger: tuple[Path, ExportReport]) -> None:
    path, report = tagger
    assert report.strategy == "torch.export"
    assert report.opset == 23
    assert report.cases == 3
    assert {deviation.output for deviation in report.deviations} == {"logits", "pooled"}
    assert all(deviation.max_abs <= deviation.bound < 1e-3 for deviation in report.deviations)
    assert report.size_bytes == path.stat().st_size
    assert report.nodes == len(ir.load(path).graph)


def test_interface_is_recorded_in_the_file(tagger: tuple[Path, ExportReport]) -> None:
    interface = interface_of(ir.load(tagger[0]))
    ids, mask = interface.inputs
    assert (ids.role, ids.low, ids.high) == ("ids", 0, 49)
    assert (mask.role, mask.padding_value) == ("mask", 0)
    assert interface.batch == "batch"
    assert interface.typical_sizes == {"batch": 2, "seq": 6}


def test_no_other_files_are_left(tagger: tuple[Path, ExportReport]) -> None:
    assert [file.name for file in tagger[0].parent.iterdir()] == ["tagger.onnx"]


def assert_refused(function: str, error_type: type[RyzenError], message: str, folder: Path) -> None:
    """Assert that the module of `function` is not exported, with this error, and that no file is written."""
    with pytest.raises(error_type, match=message):
        export(f"{MODULES}:{function}", folder / "m.onnx")
    assert not list(folder.iterdir())


def test_graph_with_other_outputs_is_refused_and_not_written(tmp_path: Path) -> None:
    message = r"output `output` of the exported graph differs from that of the module by .*sample 0, 2x6"
    assert_refused("inconsistent", AccuracyError, message, tmp_path)


def test_refused_export_keeps_the_existing_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    earlier = tiny_models.write(path).read_bytes()
    with pytest.raises(AccuracyError):
        export(f"{MODULES}:inconsistent", path)
    assert path.read_bytes() == earlier


def test_a_file_that_is_not_onnx_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "notes.onnx"
    path.write_text("my notes")
    with pytest.raises(RyzenError, match="exists and is not an ONNX file"):
        export(f"{MODULES}:inconsistent", path, max_abs=10)
    assert path.read_text() == "my notes"


def test_max_abs_is_the_accepted_deviation(tmp_path: Path) -> None:
    report = export(f"{MODULES}:inconsistent", tmp_path / "m.onnx", max_abs=10)
    assert report.deviations[0].bound == 10
    assert 0.1 < report.deviations[0].max_abs < 10


def test_branch_on_tensor_values_is_refused_with_its_line(tmp_path: Path) -> None:
    message = r"branches on tensor values, .*GuardOnDataDependentSymNode: .*\(torch_modules.py, line \d+\)"
    assert_refused("branching", RyzenError, message, tmp_path)


def test_tracer_is_the_fallback_and_is_reported(tmp_path: Path) -> None:
    report = export(f"{MODULES}:untraceable", tmp_path / "m.onnx", dynamic={"x": {0: "n"}})
    assert report.strategy == "the tracer"
    assert report.opset == 20
    assert "NotImplementedError: not by torch.export (torch_modules.py, line" in report.notes[0]
    assert report.inputs == ("x: float32[n, 3]",)


def test_unsupported_op_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RyzenError, match="cannot be exported: torch.export: .*bessel_j0") as caught:
        export(f"{MODULES}:bessel", tmp_path / "m.onnx")
    assert "the fallback fails too: the tracer: " in (caught.value.hint or "")
    assert capfd.readouterr() == ("", "")


def test_dimension_that_the_module_fixes_is_named(tmp_path: Path) -> None:
    with pytest.raises(RyzenError, match="axis 0 of input `x` was requested as dynamic, but the module fixes its size at 2"):
        export(f"{MODULES}:fixing", tmp_path / "m.onnx", dynamic={"x": {0: "n"}})


def test_hint_names_axes_of_the_same_size_of_other_inputs(tmp_path: Path) -> None:
    with pytest.raises(
        RyzenError, match="axis 0 of input `x` was requested as dynamic, but the module fixes its size at 2"
    ) as caught:
        export(f"{MODULES}:joined_by_name", tmp_path / "m.onnx", dynamic={"x": {0: "n"}})
    assert "make its axis dynamic too: --dynamic y:0=n" in (caught.value.hint or "")
    report = export(f"{MODULES}:joined_by_name", tmp_path / "m.onnx", dynamic={"x": {0: "n"}, "y": {0: "n"}})
    assert report.inputs == ("x: float32[n, 6]", "y: float32[n, 6]")


def test_graph_has_the_names_of_the_recipe_also_for_variadic_inputs(tmp_path: Path) -> None:
    report = export(f"{MODULES}:recipe", tmp_path / "m.onnx")
    assert report.inputs == tuple(f"in.{index}: float32[n, 4]" for index in range(3))
    model = ir.load(tmp_path / "m.onnx")
    assert [value.name for value in model.graph.outputs] == ["out.0", "out.1", "out.2"]
    assert all(deviation.bound == 1e-6 for deviation in report.deviations)


@pytest.mark.parametrize(("stated", "recorded"), [(None, 0), (0, 0), (1, 1)])
def test_padding_value_that_a_recipe_does_not_state_is_inferred(
    tagger: tuple[Path, ExportReport], stated: Literal[0, 1] | None, recorded: int
) -> None:
    export_spec = make_export_spec(f"{MODULES}:tagger", BOTH_DYNAMIC, seed=0)
    ids, mask = interface_of(ir.load(tagger[0])).inputs
    declared = Interface(inputs=(ids, msgspec.structs.replace(mask, padding_value=stated)), outputs=())
    model = ir.load(tagger[0])
    del model.metadata_props[METADATA_KEY]
    complete = complete_interface(replace(export_spec, interface=declared, interface_declared=True), model)
    assert complete.input("attention_mask").padding_value == recorded


def test_dynamic_is_refused_for_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="recipe `pair` declares its own dynamic dimensions"):
        export(f"{MODULES}:recipe", tmp_path / "m.onnx", dynamic={"in.0": {0: "n"}})


def test_one_name_for_two_sizes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="`n` is 2 and 6 in the sample inputs"):
        export(f"{MODULES}:tagger", tmp_path / "m.onnx", dynamic={"input_ids": {0: "n", 1: "n"}})


def test_unknown_input_is_refused_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the module has no input `input_id`\n\nhint: did you mean `input_ids`"):
        export(f"{MODULES}:tagger", tmp_path / "m.onnx", dynamic={"input_id": {0: "n"}})


def test_module_without_sample_inputs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="makes a module without sample inputs"):
        export(f"{MODULES}:module_alone", tmp_path / "m.onnx")


def test_invalid_output_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="must be the path of a file in an existing folder"):
        export(f"{MODULES}:tagger", tmp_path / "nowhere" / "m.onnx")
    with pytest.raises(UsageError, match="is a folder") as caught:
        export(f"{MODULES}:tagger", tmp_path)
    assert str(tmp_path / "model.onnx") in (caught.value.hint or "")


@pytest.mark.parametrize(("requested", "exported"), [(99, 18), (9, 18)])
def test_opset_that_torch_does_not_support_is_refused(tmp_path: Path, requested: int, exported: int) -> None:
    with pytest.raises(RyzenError, match=f"at opset {exported}, not at the requested opset {requested}"):
        export((torch.nn.ReLU(), torch.rand(2, 3)), tmp_path / "m.onnx", opset=requested)
    assert not list(tmp_path.iterdir())


def test_requested_opset_is_used(tmp_path: Path) -> None:
    assert export((torch.nn.ReLU(), torch.rand(2, 3)), tmp_path / "m.onnx", opset=21).opset == 21
    assert ir.load(tmp_path / "m.onnx").opset_imports[""] == 21


def test_weights_too_large_for_one_file_are_external(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ryzen_compile.exporter._MAX_INLINE_BYTES", 1000)
    report = export((torch.nn.Linear(64, 64), torch.rand(2, 64)), tmp_path / "m.onnx")
    sizes = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert sizes.keys() == {"m.onnx", "m.onnx.data"}
    assert sizes["m.onnx.data"] >= 64 * 64 * 4
    assert report.size_bytes == sum(sizes.values())
    assert onnxruntime.InferenceSession(tmp_path / "m.onnx").get_outputs()[0].shape == [2, 64]


def test_sizes_that_the_module_accepts_are_found_recorded_and_reported(tmp_path: Path) -> None:
    progress = StageCounts()
    report = export(f"{MODULES}:windowed", tmp_path / "m.onnx", dynamic={"wave": {0: "batch", 1: "time"}}, progress=progress)
    assert report.sizes == {"batch": "1..", "time": "10..64"}
    search, graph_runs, module_runs = progress.stages
    assert search.title == "find the sizes that the module accepts"
    assert search.done > 5
    assert [str(graph_runs), str(module_runs)] == [
        f"run the graph: {report.cases} of {report.cases} samples",
        f"run the module: {report.cases} of {report.cases} cases",
    ]
    assert [note.partition(": ")[0] for note in report.notes] == ["`time` starts at 10", "`time` ends at 64"]
    interface = interface_of(ir.load(tmp_path / "m.onnx"))
    assert (interface.min_sizes, interface.max_sizes) == ({"time": 10}, {"time": 64})
    profile = derive_profile(interface)
    assert (profile.min["wave"], profile.opt["wave"], profile.max["wave"]) == ((1, 10), (2, 40), (8, 64))


def test_given_ranges_are_recorded_and_trial_sizes_are_within_them(tmp_path: Path) -> None:
    report = export(f"{MODULES}:windowed", tmp_path / "m.onnx", dynamic={"wave": {0: "batch", 1: "time:20..50"}})
    assert report.sizes["time"] == "20..50"
    assert not report.notes


def test_given_range_that_the_module_does_not_accept_is_refused_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(RyzenError, match=r"the module fails: .*Kernel size.*time=4") as caught:
        export(f"{MODULES}:windowed", tmp_path / "m.onnx", dynamic={"wave": {0: "batch", 1: "time:4..50"}})
    assert "as in `--dynamic wave:0=batch:2..,1=time:40..50`" in (caught.value.hint or "")


RECURRENT_AXES = {"mel": {0: "batch", 1: "time:4..50"}, "lengths": {0: "batch"}}


def test_integers_that_count_elements_of_each_row_are_lengths_and_no_mask(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    export(f"{MODULES}:recurrent", path, dynamic=RECURRENT_AXES)
    interface = interface_of(ir.load(path))
    lengths = interface.input("lengths")
    assert (lengths.role, lengths.length_dim) == ("lengths", "time")
    inputs = synthesize(interface, {"mel": (3, 9, 4), "lengths": (3,)}, seed=0, rows="mixed")
    assert sorted(inputs["lengths"]) == [1, 5, 9]


def test_the_hint_for_values_that_the_module_does_not_accept_names_them(tmp_path: Path) -> None:
    with pytest.raises(RyzenError, match=r"the module fails: .*time=4") as caught:
        export(f"{MODULES}:short_recurrent", tmp_path / "m.onnx", dynamic=RECURRENT_AXES)
    assert "`lengths` was drawn from 13..18: return sample inputs with the values" in (caught.value.hint or "")


def test_a_note_names_the_input_whose_axis_was_forgotten_and_works_when_followed(tmp_path: Path) -> None:
    report = export(f"{MODULES}:recurrent", tmp_path / "m.onnx", dynamic={"mel": RECURRENT_AXES["mel"]})
    (note,) = (note for note in report.notes if "--dynamic" in note)
    assert note.endswith("add --dynamic lengths:0=batch")
    report = export(f"{MODULES}:recurrent", tmp_path / "m.onnx", dynamic={"mel": {0: "batch"}, "lengths": {0: "batch"}})
    assert report.sizes == {"batch": "1.."}
    assert not [note for note in report.notes if "--dynamic" in note]


def test_range_without_the_size_of_the_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"`time` is 40 in the sample inputs, outside of its range 50..60"):
        export(f"{MODULES}:windowed", tmp_path / "m.onnx", dynamic={"wave": {1: "time:50..60"}})


def test_pickle_is_refused_with_and_without_an_output_path(tmp_path: Path) -> None:
    for path in (None, tmp_path / "m.onnx"):
        with pytest.raises(UsageError, match=r"`model\.pt` is a pickle, which runs code when it is read"):
            export("model.pt", path)


def test_another_opset_is_tried_if_the_graph_fails_at_the_default_one(tmp_path: Path) -> None:
    dynamic = {"x": {0: "batch", 1: "seq"}, "mask": {0: "batch", 1: "seq"}}
    report = export(f"{MODULES}:broadcast_mask", tmp_path / "m.onnx", dynamic=dynamic)
    assert report.opset == 18
    assert report.notes[0].startswith("opset 23 failed, so opset 18 was used: the exported graph fails on inputs")
    assert str(tmp_path) not in report.notes[0], "the folder of the compared graph is a temporary one"
    with pytest.raises(AccuracyError, match="the exported graph fails on inputs that the module accepts") as caught:
        export(f"{MODULES}:broadcast_mask", tmp_path / "n.onnx", dynamic=dynamic, opset=23)
    assert "omit --opset" in (caught.value.hint or "")


def test_hint_for_sizes_at_which_graph_and_module_differ_works_when_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searches: list[str | None] = []

    def search(*arguments: Any, **options: Any) -> str | None:
        searches.append(sizes_hint(*arguments, **options))
        return searches[-1]

    monkeypatch.setattr("ryzen_compile.exporter.sizes_hint", search)
    with pytest.raises(AccuracyError, match="the exported graph") as caught:
        export(f"{MODULES}:pooling", tmp_path / "m.onnx", dynamic={"input": {0: "batch", 2: "h"}})
    options = re.findall(r"--dynamic (\S+?)[:;]? ", f"{caught.value.hint} ")
    assert len(searches) == 1, "the graph of the other opset differs too, and its error does not leave the export"
    report = export(f"{MODULES}:pooling", tmp_path / "m.onnx", dynamic=parse_dynamic(options))
    assert report.cases
