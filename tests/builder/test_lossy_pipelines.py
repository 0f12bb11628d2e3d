"""Builds with lossy passes of a third-party package: held to their own floor, while other passes are held to the criteria."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pytest
from support import fake_passes, tiny_models
from support.external_packages import run_program

from ryzen_compile.artifacts.package.manifest import AccuracyFloor
from ryzen_compile.builder.accuracy import (
    AccuracyCheck,
    GraphFile,
    accuracy_checks,
    check_floors,
    variant_floor,
)
from ryzen_compile.builder.resolve import AccuracyPolicy
from ryzen_compile.builder.variants import passes_in_order
from ryzen_compile.errors import PipelineError
from ryzen_compile.numerics.criteria import floor_criteria
from ryzen_compile.pipeline.parser import parse
from ryzen_compile.spec.fidelity import AccuracyBudget, Fidelity, Lossy, loss_of
from ryzen_compile.spec.pass_record import PassRecord
from ryzen_compile.spec.passes import Pass, recorded_spec


def build(tmp_path: Path, passes: str, *options: str, exit_code: int) -> str:
    tiny_models.write(tmp_path / "small.onnx")
    arguments = ("build", "small.onnx", "--gpu", "cpu", "-q", "--passes", passes, *options)
    return run_program(*arguments, cwd=tmp_path, exit_code=exit_code).stderr


def variant(package: Path) -> dict[str, Any]:
    manifest = json.loads((package / "manifest.json").read_text())
    record: dict[str, Any] = manifest["graphs"][0]["variants"][0]
    return record


def test_a_floor_missed_on_random_values_is_a_reason_to_give_samples(tmp_path: Path) -> None:
    passes = "fold,acme-round-weights{levels=3,floor=0.9999}"
    error = build(tmp_path, passes, exit_code=1)
    assert "the compared values come from a seed: give real samples with --data" in error
    assert "acme-round-weights{floor=...}" in error
    np.savez(tmp_path / "samples.npz", x=np.ones((2, 16), np.float32))
    assert "come from a seed" not in build(tmp_path, passes, "--data", "samples.npz", exit_code=1)


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
    error = build(tmp_path, passes, exit_code=1)
    assert "does not meet y max_abs <= 0.0001 after `acme-scale-weights`: worst value" in error


def test_the_floor_is_a_required_option_and_must_be_in_range(tmp_path: Path) -> None:
    assert "the option `floor` of `acme-round-weights` is required" in build(
        tmp_path, "acme-round-weights{levels=8}", exit_code=2
    )
    assert "the floor of `cosine` must be" in build(tmp_path, "acme-round-weights{levels=8,floor=1.5}", exit_code=2)


TWO_LOSSY_PASSES = "acme-round-weights{levels=4000,floor=0.9},fold,acme-round-weights{levels=300,floor=0.9}"


def test_each_lossy_pass_has_its_share_of_the_budget_of_the_pipeline(tmp_path: Path) -> None:
    build(tmp_path, TWO_LOSSY_PASSES, "--accuracy-floor", "cosine=0.99", exit_code=0)
    accuracy = variant(tmp_path / "small.ryzen")["accuracy"]
    whole = [record for record in accuracy if record["criteria"] == "the floor of the pipeline: cosine >= 0.99"]
    assert [(record["met"], record["passes"]) for record in whole] == [(True, [])]
    first, second = (record["loss_share"] for record in accuracy if record["loss_share"])
    assert 0 < first["loss"] < second["loss"]
    assert first["loss"] == first["total"]
    assert first["loss"] + second["loss"] == pytest.approx(second["total"])
    cosine = next(metric["worst"] for metric in whole[0]["metrics"] if metric["name"] == "cosine")
    assert second["total"] == pytest.approx(1 - cosine)
    assert first["budget"] == second["budget"] == pytest.approx(0.01)


def test_passes_within_their_floors_can_exceed_the_budget_of_the_pipeline(tmp_path: Path) -> None:
    passes = "acme-round-weights{levels=60,floor=0.9},acme-round-weights{levels=50,floor=0.9}"
    assert "cosine >= 0.99999" in build(tmp_path, passes, "--accuracy-floor", "cosine=0.99999", exit_code=1)
    accuracy = variant(tmp_path / "small.ryzen")["accuracy"]
    assert [record["met"] for record in accuracy] == [True, True, False]
    build(tmp_path, passes, exit_code=0)  # the package of another budget is not taken from the cache


def record_of(pass_: Pass, outcome: Literal["changed", "nothing-to-do"] = "changed") -> PassRecord:
    return PassRecord(
        pass_spec=str(pass_), outcome=outcome, reason="", fidelity=str(pass_.fidelity), nodes_before=0, nodes_after=0
    )


def checks_of(pass_: Pass, policy: AccuracyPolicy) -> tuple[AccuracyCheck, ...]:
    """Return the comparisons of a variant that `pass_` changed."""
    record = record_of(pass_)
    source, state, graph = (GraphFile(path=f"{name}.onnx", digest=name) for name in ("source", "state", "variant"))
    return accuracy_checks([pass_], [record], {1: state}, source=source, variant=graph, policy=policy)


def test_the_checkpoints_around_lossy_passes_are_reused_and_not_part_of_the_package(tmp_path: Path) -> None:
    build(tmp_path, TWO_LOSSY_PASSES, exit_code=0)
    first = variant(tmp_path / "small.ryzen")["accuracy"]
    arguments = ("build", "small.onnx", "--gpu", "cpu", "--passes", TWO_LOSSY_PASSES, "--accuracy-floor", "cosine=0.5")
    messages = run_program(*arguments, cwd=tmp_path, exit_code=0).stderr
    assert "for onnxruntime: taken from the cache" in messages
    assert messages.count("comparison of checkpoints/") == 3
    second = variant(tmp_path / "small.ryzen")["accuracy"]
    assert [record["metrics"] for record in second[: len(first)]] == [record["metrics"] for record in first]
    assert len(second) == len(first) + 1
    assert not list((tmp_path / "small.ryzen").rglob("*after-pass*"))


def test_a_pass_without_a_floor_is_held_to_the_budget() -> None:
    policy = AccuracyPolicy(budget=AccuracyBudget("cosine", 0.98))
    check = checks_of(Unchecked(metric="perplexity_ratio", floor=None), policy)[0]
    assert check.floor == AccuracyFloor(metric="cosine", value=0.98, origin="the pipeline")


def test_the_finished_variant_is_held_to_the_floor_of_its_last_lossy_pass() -> None:
    lossy, exact = Unchecked(metric="cosine", floor=0.9), fake_passes.AbsToRelu()
    source, state, graph = (GraphFile(path=f"{name}.onnx", digest=name) for name in ("source", "state", "variant"))

    def checks(*passes: Pass) -> list[tuple[str, str, bool]]:
        log = [record_of(pass_) for pass_ in passes]
        found = accuracy_checks(passes, log, {1: state}, source=source, variant=graph, policy=AccuracyPolicy())
        return [(check.candidate.path, check.baseline.path, check.floor is not None) for check in found]  # type: ignore[union-attr]

    assert checks(lossy) == [("state.onnx", "source.onnx", True)]
    assert checks(lossy, exact) == [
        ("state.onnx", "source.onnx", True),
        ("variant.onnx", "state.onnx", False),
        ("variant.onnx", "source.onnx", True),
    ]


@dataclass(frozen=True, kw_only=True)
class ReadsFile(fake_passes.AbsToRelu):
    """A lossy pass with an option that names a file."""

    scales: str

    @property
    def fidelity(self) -> Fidelity:
        return Lossy("cosine", 0.9)


def test_a_pass_whose_option_names_a_file_is_recorded_without_the_folder(tmp_path: Path) -> None:
    (tmp_path / "scales.npz").write_bytes(b"")
    passes = [ReadsFile(scales=str(tmp_path / "scales.npz")), fake_passes.AbsToRelu()]
    log = [msgspec.structs.replace(record_of(pass_), pass_spec=recorded_spec(pass_)) for pass_ in reversed(passes)]
    ordered = passes_in_order(passes, log)
    assert ordered == passes[::-1]
    floor = variant_floor(ordered, log, None)
    assert floor is not None
    assert (floor.origin, floor.passes) == ("`reads-file{scales=scales.npz}`", ("reads-file{scales=scales.npz}",))


def test_the_floor_of_a_variant_is_the_budget_or_that_of_the_last_lossy_pass() -> None:
    first, last = Unchecked(metric="cosine", floor=0.9), Unchecked(metric="snr_db", floor=20.0)
    passes = [first, last, fake_passes.AbsToRelu()]
    changed = [record_of(pass_) for pass_ in passes]
    budget = AccuracyBudget("top1", 0.8)
    specs = (str(first), str(last))
    assert variant_floor(passes, changed, budget) == AccuracyFloor(
        metric="top1", value=0.8, origin="the pipeline", passes=specs
    )
    assert variant_floor(passes, changed, None) == AccuracyFloor(metric="snr_db", value=20.0, origin=f"`{last}`", passes=specs)
    assert variant_floor(passes, [record_of(pass_, "nothing-to-do") for pass_ in passes], budget) is None
    unchecked = Unchecked(metric="cosine", floor=None)
    assert variant_floor([unchecked], [record_of(unchecked)], None) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--accuracy-floor", "cosine"), "METRIC=FLOOR"),
        (("--accuracy-floor", "cosine=high"), "`high` is not a number"),
        (("--accuracy-floor", "cosine=2"), "must be a number in [-1, 1]"),
        (("--accuracy-floor", "perplexity_ratio=0.9"), "does not measure `perplexity_ratio`"),
        (("--accuracy-floor", "cosine=0.9", "--no-compare"), "switched off"),
        (("--baseline", "small.onnx"), "not a PyTorch module"),
    ],
)
def test_a_budget_or_baseline_that_cannot_be_checked_is_a_usage_error(
    options: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    assert message in build(tmp_path, "fold", *options, exit_code=2)
    assert not (tmp_path / "small.ryzen").exists()


def test_a_loss_is_zero_for_a_graph_that_equals_its_source() -> None:
    assert [loss_of("cosine", 1.0), loss_of("top1", 1.0), loss_of("snr_db", float("inf"))] == [0, 0, 0]
    assert loss_of("snr_db", 20.0) == pytest.approx(0.01)


SCRIPT = """
import numpy as np
import torch


class Small(torch.nn.Module):
    def __init__(self, seed):
        super().__init__()
        rng = np.random.default_rng(seed)
        self.a, self.b = (
            torch.nn.Parameter(torch.from_numpy((rng.standard_normal((16, 16)) / 4).astype(np.float32))) for _ in range(2)
        )

    def forward(self, x):
        return torch.relu(x @ self.a * 0.5) @ self.b


def make():
    return Small({seed})
"""


def write_script(tmp_path: Path, seed: int) -> str:
    (tmp_path / "small.py").write_text(SCRIPT.replace("{seed}", str(seed)))
    return f"{tmp_path / 'small.py'}:make"


def test_a_lossy_variant_is_compared_with_the_same_method_in_pytorch(tmp_path: Path) -> None:
    rounding = "acme-round-weights{levels=60,floor=0.9}"
    build(tmp_path, f"fold,{rounding}", "--baseline", write_script(tmp_path, 0), exit_code=0)
    *_, against_source, against_torch = variant(tmp_path / "small.ryzen")["accuracy"]
    assert against_source["passes"] == [rounding]
    assert against_source["baseline"].startswith("small.onnx, ")
    assert against_torch["passes"] == []
    assert against_torch["baseline"].startswith(f"small.py:make with `{rounding}`, by PyTorch ")
    worst = {
        name: next(metric["worst"] for metric in record["metrics"] if metric["name"] == "max_abs")
        for name, record in (("source", against_source), ("torch", against_torch))
    }
    assert worst["torch"] < 1e-5 < worst["source"]
    build(tmp_path, f"fold,{rounding}", "--baseline", write_script(tmp_path, 1), exit_code=1)


def test_an_exact_variant_is_compared_with_a_pytorch_baseline(tmp_path: Path) -> None:
    build(tmp_path, "fold", "--baseline", write_script(tmp_path, 0), exit_code=0)
    assert [record["met"] for record in variant(tmp_path / "small.ryzen")["accuracy"]] == [True, True]
    build(tmp_path, "fold", "--baseline", write_script(tmp_path, 1), exit_code=1)


def test_a_lossy_pass_without_a_pytorch_form_is_noted() -> None:
    policy = AccuracyPolicy(torch_baseline="small.py:make")
    pass_ = Unchecked(metric="cosine", floor=0.9)
    (check,) = checks_of(pass_, policy)
    assert check.notes == (f"not compared with the same method in PyTorch: `{pass_.name}` has no PyTorch form",)


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
def test_a_lossy_pass_that_a_build_cannot_check_is_refused(metric: str, floor: float | None, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        check_floors([Unchecked(metric=metric, floor=floor)], AccuracyPolicy())


@pytest.mark.parametrize("arguments", [("cosine", 1.5), ("top1", -0.1), ("cosine", float("nan")), ("accuracy", 0.9)])
def test_a_floor_outside_of_its_metric_is_refused(arguments: tuple[str, float]) -> None:
    with pytest.raises(ValueError, match="metric|floor"):
        Lossy(*arguments)


def test_a_signal_to_noise_ratio_is_a_bound_of_the_relative_error() -> None:
    criteria = floor_criteria("snr_db", 40.0, "`p`")
    assert criteria.tolerances["fp16"].relative_l2 == pytest.approx(0.01)
    with pytest.raises(ValueError, match="does not measure"):
        floor_criteria("perplexity_ratio", 0.9, "`p`")


def test_passes_that_change_what_a_decoder_attends_to_are_lossy() -> None:
    specs = "kv-evict,kv-window{window=8},kv-compact,kv-select{selected-pages=1},kv-quant,kv-static{capacity=8},fold,attention"
    declared = {pass_.name: str(pass_.fidelity) for pass_ in parse(specs)}
    lossy = dict.fromkeys(
        ("kv-evict", "kv-window", "kv-compact", "kv-select", "kv-quant"), "lossy: perplexity_ratio without a floor"
    )
    assert declared == {**lossy, **dict.fromkeys(("kv-static", "fold", "attention"), "exact")}
    assert [str(pass_.fidelity) for pass_ in parse("precision{to=fp16},precision{to=fp32}")] == [
        "within the numeric criteria",
        "exact",
    ]
