"""Tests of rewrite: the decoder group of step graphs depends on contents, not on paths, and each graph is checked once."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import pytest
from support import fake_passes, tiny_models
from support.decoders import export

import ryzen_compile as rc
from ryzen_compile.builder.export_steps import export_steps
from ryzen_compile.builder.rewrite import RewriteConfig, _decoder_group, rewrite, rewrite_steps
from ryzen_compile.data.synthetic import synthesize
from ryzen_compile.exporter import Deviation, ExportReport
from ryzen_compile.ir import save as ir_save
from ryzen_compile.ir.interface_metadata import interface_of, write_interface
from ryzen_compile.ir.load import load
from ryzen_compile.ir.validity import find_invalidity
from ryzen_compile.processes.limits import ResourceLimits
from ryzen_compile.progress import SilentProgress
from ryzen_compile.spec.interface import InputSpec, Interface, TensorSpec
from ryzen_compile.spec.passes import recorded_spec
from ryzen_compile.spec.profile import derive_profile


@dataclass(frozen=True, kw_only=True)
class FittedPass(fake_passes.ReplaceOpType):
    """A pass with a step width, a statistics file and calibration."""

    name: ClassVar[str] = "fitted"
    step: int = 0
    statistics: str = ""

    @property
    def needs_calibration(self) -> bool:
        return True

    def with_step_width(self, width: int) -> FittedPass:
        return replace(self, step=width)


def group(passes: list[FittedPass], *, data: Path | None = None) -> str:
    model = fake_passes.toy_model()
    specs = Interface(
        inputs=(InputSpec(name="x", dtype="float32", dims=("N",)),),
        outputs=(TensorSpec(name="y", dtype="float32", dims=("N",)),),
    )
    write_interface(model, specs)
    return _decoder_group(model, passes, RewriteConfig(passes="fitted", data=str(data) if data else None))


def write_statistics(path: Path, content: bytes) -> FittedPass:
    path.write_bytes(content)
    return FittedPass(statistics=str(path))


def test_the_decoder_group_depends_on_the_content_of_statistics_files(tmp_path: Path) -> None:
    before = group([write_statistics(tmp_path / "a.npz", b"1")])
    assert group([write_statistics(tmp_path / "b.npz", b"1")]) == before
    assert group([write_statistics(tmp_path / "a.npz", b"2")]) != before


def test_the_decoder_group_depends_on_the_content_of_calibration_data(tmp_path: Path) -> None:
    for name, value in (("a.npz", 1.0), ("b.npz", 1.0), ("c.npz", 2.0)):
        np.savez(tmp_path / name, x=np.full(3, value, np.float32))
    first, same, other = (group([FittedPass()], data=tmp_path / name) for name in ("a.npz", "b.npz", "c.npz"))
    assert first == same != other


def test_the_measurement_of_ranges_has_the_limits_of_the_rewrite(tmp_path: Path) -> None:
    source = tiny_models.write(tmp_path / "small.onnx")
    np.savez(tmp_path / "x.npz", x=np.ones((2, tiny_models.WIDTH), np.float32))
    result = rc.rewrite(
        source, tmp_path / "half.onnx", passes="precision{to=fp16}", data=tmp_path / "x.npz", memory_limit_bytes=1
    )
    assert "exceeded its limit" in str(result.passes[0].warnings)


def test_the_measurement_of_ranges_has_the_limits_of_an_export_or_rewrite_of_steps(tmp_path: Path) -> None:
    source = export("llama", "optimum-sdpa")
    interface = interface_of(load(source))
    np.savez(tmp_path / "samples.npz", **synthesize(interface, derive_profile(interface).opt, seed=0, rows="mixed"))

    def copy_to(path: Path) -> ExportReport:
        shutil.copytree(source.parent, path.parent, dirs_exist_ok=True)
        (path.parent / source.name).rename(path)
        deviation = Deviation(output="logits", dtype="float32", max_abs=0.0, bound=1e-4, case="sample 0")
        fields = {**dict.fromkeys(ExportReport.__struct_fields__), "deviations": (deviation,), "notes": (), "cases": 1}
        return ExportReport(**fields)

    passes, samples = ["kv-static{capacity=64}", "precision{to=fp16}"], tmp_path / "samples.npz"
    (result,) = export_steps(
        copy_to,
        tmp_path / "steps",
        passes=",".join(passes),
        widths=(1,),
        data=str(samples),
        limits=ResourceLimits(memory_bytes=1),
        progress=SilentProgress(),
    )
    assert "exceeded its limit" in str(result.passes[1].warnings)
    (result,) = rc.rewrite_steps(source, tmp_path / "more", passes=passes, steps=[1], data=samples, memory_limit_bytes=1)
    assert "exceeded its limit" in str(result.passes[1].warnings)


@pytest.mark.parametrize("step", [0, 1, 8])
def test_the_decoder_group_does_not_depend_on_the_step_width(step: int) -> None:
    assert group([FittedPass(step=step)]) == group([FittedPass()])


def test_the_pass_log_names_files_without_their_folders(tmp_path: Path) -> None:
    fitted = write_statistics(tmp_path / "zap.npz", b"1")
    assert str(tmp_path) in str(fitted)
    assert recorded_spec(fitted) == "fitted{statistics=zap.npz}"
    assert recorded_spec(FittedPass(statistics="absent.npz")) == "fitted{statistics=absent.npz}"


@pytest.mark.parametrize("steps", [False, True])
def test_a_graph_is_checked_once(steps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[onnx.ModelProto] = []
    monkeypatch.setattr(ir_save, "find_invalidity", lambda proto: checks.append(proto) or find_invalidity(proto))
    config = RewriteConfig(passes="kv-static{capacity=64}")
    if steps:
        rewrite_steps(export("llama", "optimum-sdpa"), tmp_path / "decode", config, (1, 0))
    else:
        rewrite(export("llama", "optimum-sdpa"), tmp_path / "decode.onnx", config)
    assert len(checks) == 1 + steps
