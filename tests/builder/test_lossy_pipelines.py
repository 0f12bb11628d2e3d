"""Builds with lossy passes of a third-party package: held to their own floor, while other passes are held to the criteria."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support import fake_passes, tiny_models

from ryzen_compile.builder.accuracy import Checkpoints
from ryzen_compile.errors import PipelineError
from ryzen_compile.numerics.criteria import floor_criteria
from ryzen_compile.pipeline.parser import parse
from ryzen_compile.spec.fidelity import Fidelity, Lossy

ACME = Path(__file__).parent.parent / "acme"


def build(tmp_path: Path, passes: str, *options: str, exit_code: int) -> str:
    tiny_models.write(tmp_path / "small.onnx")
    command = [sys.executable, "-c", "from ryzen_compile.cli.main import main; main()", "build", str(tmp_path / "small.onnx")]
    environment = {**os.environ, "PYTHONPATH": str(ACME), "RYZEN_COMPILE_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [*command, "--gpu", "cpu", "-q", "--passes", passes, *options],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == exit_code, done.stderr
    return done.stderr


def variant(package: Path) -> dict[str, Any]:
    manifest = json.loads((package / "manifest.json").read_text())
    record: dict[str, Any] = manifest["graphs"][0]["variants"][0]
    return record


def test_a_lossy_pass_is_held_to_its_floor_and_the_others_to_the_criteria(tmp_path: Path) -> None:
    rounding = "acme-round-weights{levels=4000,floor=0.999}"
    build(tmp_path, f"fold,{rounding},fold", exit_code=0)
    record = variant(tmp_path / "small.ryzen")
    (lossy,) = [accuracy for accuracy in record["accuracy"] if accuracy["passes"] == [rounding]]
    assert lossy["met"]
    assert lossy["criteria"] == f"the floor of `{rounding}`: cosine >= 0.999"
    cosine = next(metric for metric in lossy["metrics"] if metric["name"] == "cosine")
    assert cosine["required"] == ">= 0.999"
    assert 0.999 <= cosine["worst"] < 1.0
    assert next(metric for metric in lossy["metrics"] if metric["name"] == "max_abs")["worst"] > 0
    assert [record["fidelity"] for record in record["passes"]] == ["exact", "lossy: cosine >= 0.999", "exact"]


def test_a_lossy_pass_below_its_floor_fails_the_build(tmp_path: Path) -> None:
    message = build(tmp_path, "acme-round-weights{levels=3,floor=0.9999}", exit_code=1)
    assert "cosine >= 0.9999" in message
    (accuracy,) = variant(tmp_path / "small.ryzen")["accuracy"]
    cosine = next(metric for metric in accuracy["metrics"] if metric["name"] == "cosine")
    assert not accuracy["met"]
    assert not cosine["met"]
    assert cosine["worst"] < 0.9999


def test_a_build_without_comparison_checks_no_floor(tmp_path: Path) -> None:
    build(tmp_path, "acme-round-weights{levels=3,floor=0.9999}", "--no-compare", exit_code=0)
    assert variant(tmp_path / "small.ryzen")["accuracy"] == []


@pytest.mark.parametrize(
    "passes",
    [
        "acme-scale-weights",
        "acme-scale-weights,acme-round-weights{levels=4000,floor=0.5}",
        "acme-round-weights{levels=4000,floor=0.5},acme-scale-weights",
    ],
)
def test_a_wrong_rewrite_does_not_hide_behind_a_declared_loss(tmp_path: Path, passes: str) -> None:
    assert "max_abs" in build(tmp_path, passes, exit_code=1)


def test_the_floor_is_a_required_option_and_must_be_in_range(tmp_path: Path) -> None:
    assert "missing required field `floor`" in build(tmp_path, "acme-round-weights{levels=8}", exit_code=2)
    assert "the floor of `cosine` must be" in build(tmp_path, "acme-round-weights{levels=8,floor=1.5}", exit_code=2)


@dataclass(frozen=True, kw_only=True)
class Unchecked(fake_passes.AbsToRelu):
    """A lossy pass that a build cannot check."""

    metric: str
    floor: float | None

    @property
    def fidelity(self) -> Fidelity:
        return Lossy(self.metric, self.floor)


@pytest.mark.parametrize(
    ("metric", "floor", "message"),
    [("cosine", None, "declares no floor"), ("perplexity_ratio", 0.9, "`perplexity_ratio`, which a build does not measure")],
)
def test_a_lossy_pass_that_a_build_cannot_check_is_refused(
    metric: str, floor: float | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(PipelineError, match=message):
        Checkpoints([Unchecked(metric=metric, floor=floor)], tmp_path / "m.onnx", tmp_path)


@pytest.mark.parametrize("arguments", [("cosine", 1.5), ("top1", -0.1), ("cosine", float("nan")), ("accuracy", 0.9)])
def test_a_floor_outside_of_its_metric_is_refused(arguments: tuple[str, float]) -> None:
    with pytest.raises(ValueError, match="metric|floor"):
        Lossy(*arguments)


def test_a_signal_to_noise_ratio_is_a_bound_of_the_relative_error() -> None:
    criteria = floor_criteria(Lossy("snr_db", 40.0), "`p`")
    assert criteria.tolerances["fp16"].relative_l2 == pytest.approx(0.01)
    with pytest.raises(ValueError, match="cannot check"):
        floor_criteria(Lossy("cosine", None), "`p`")


def test_passes_that_change_what_a_decoder_attends_to_are_lossy() -> None:
    specs = "kv-evict,kv-window{window=8},kv-compact,kv-select,kv-quant,kv-static{capacity=8},fold,attention"
    declared = {pass_.name: str(pass_.fidelity) for pass_ in parse(specs)}
    lossy = dict.fromkeys(
        ("kv-evict", "kv-window", "kv-compact", "kv-select", "kv-quant"), "lossy: perplexity_ratio without a floor"
    )
    assert declared == {**lossy, **dict.fromkeys(("kv-static", "fold", "attention"), "exact")}
    assert [str(pass_.fidelity) for pass_ in parse("precision{to=fp16},precision{to=fp32}")] == [
        "within the numeric criteria",
        "exact",
    ]
