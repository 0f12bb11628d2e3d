"""Criteria: defaults, files, faults and overrides."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from ryzen_compile.errors import RyzenError, UsageError
from ryzen_compile.numerics.accumulator import Accumulator
from ryzen_compile.numerics.criteria import coarser, default_criteria, floor_criteria, load_criteria
from ryzen_compile.numerics.metrics import measure


def test_the_defaults_set_limits_for_every_precision() -> None:
    criteria = default_criteria()
    assert criteria.tolerances["fp32"].max_abs == 1e-4
    assert criteria.tolerances["fp32"].top1 == 1.0
    assert criteria.tolerances["fp16"].cosine == 0.9999
    assert criteria.tolerances["bf16"].cosine == 0.999
    assert criteria.tolerances["fp16"].top1 == criteria.tolerances["bf16"].top1 == 0.99
    assert criteria.tolerances["fp16"].max_abs is None


def test_a_file_replaces_the_tables_that_it_contains(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[fp16]\ncosine = 0.5\n[fp16.outputs."last hidden"]\nmax_abs = 2\n')
    criteria = load_criteria(file)
    assert criteria.name == "mine.toml"
    assert criteria.tolerances["fp16"].cosine == 0.5
    assert criteria.tolerances["fp16"].relative_l2 is None
    assert criteria.tolerances["fp32"] == default_criteria().tolerances["fp32"]
    assert criteria.for_output("fp16", "other") == criteria.tolerances["fp16"]
    special = criteria.for_output("fp16", "last hidden")
    assert (special.cosine, special.max_abs) == (0.5, 2.0)


def test_limits_for_an_unknown_output_are_rejected(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        "[fp32]\nmax_abs = 1\n[fp32.outputs.nope]\nmax_abs = 1\n[fp16]\ncosine = 0.5\n[fp16.outputs.logits]\ncosine = 0.4\n"
    )
    criteria = load_criteria(file)
    criteria.check_outputs(["nope", "logits"])
    with pytest.raises(UsageError, match=r"`mine.toml`: \[fp32.outputs.nope\] names no output"):
        criteria.check_outputs(["logits"])


def test_all_faults_of_a_file_are_reported_together(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(
        'fp32 = 3\n[fp15]\ncosine = 1\n[fp16]\ncosin = 0.9\ntop1 = 1.5\nmax_abs = "big"\nrelative_l2 = true\n'
        "[fp16.outputs.y]\nmax_abs = -1\n[bf16]\n"
    )
    with pytest.raises(UsageError) as caught:
        load_criteria(file)
    for fault in (
        "`fp32` is a value; it must be a table",
        "there is no precision `fp15`: did you mean `fp16`?",
        "[fp16] there is no limit `cosin`: did you mean `cosine`?",
        "[fp16] `top1` must be in [0, 1] (got 1.5)",
        "[fp16] `max_abs` must be a number (got 'big')",
        "[fp16] `relative_l2` must be a number (got True)",
        "[fp16.outputs.y] `max_abs` must be a finite number of at least 0 (got -1)",
        "[bf16] sets no limit",
    ):
        assert fault in caught.value.message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "it contains no table"),
        ("[fp16", "is not TOML"),
        ("[fp16]\ncosine = nan", "`cosine` must be in [-1, 1] (got nan)"),
        ("[fp16]\ncosine=0.9\noutputs = 3", "must contain tables"),
    ],
)
def test_a_file_without_limits_is_rejected(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(content)
    with pytest.raises(UsageError, match="bad.toml") as caught:
        load_criteria(file)
    assert message in caught.value.message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RyzenError, match=r"missing.toml` cannot be read: No such file"):
        load_criteria(tmp_path / "missing.toml")


def test_flags_replace_one_limit_everywhere_and_appear_in_the_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[fp32]\nmax_abs = 1\n[fp32.outputs.y]\ncosine = 0.1\n")
    criteria = load_criteria(file).override(cosine=0.7, top1=None)
    assert criteria.name == "mine.toml, with --cosine 0.7"
    assert {criteria.for_output(precision, "y").cosine for precision in ("fp32", "fp16", "bf16")} == {0.7}
    assert criteria.tolerances["fp32"].max_abs == 1.0
    assert default_criteria().override(cosine=None) == default_criteria()


def test_a_max_abs_flag_overrides_the_limit_relative_to_the_magnitude() -> None:
    assert default_criteria().tolerances["fp32"].max_abs_limit(1000.0) == pytest.approx(1e-2)
    assert default_criteria().tolerances["fp32"].max_abs_limit(2.0) == pytest.approx(1e-4)
    assert default_criteria().override(max_abs=1e-3).tolerances["fp32"].max_abs_limit(1000.0) == pytest.approx(1e-3)


def test_a_flag_out_of_range_is_rejected() -> None:
    with pytest.raises(UsageError, match=r"`cosine` must be in \[-1, 1\] \(got 2\)"):
        default_criteria().override(cosine=2.0)


def test_the_limits_of_the_coarser_precision_apply() -> None:
    assert coarser("fp32", "fp16") == "fp16"
    assert coarser("bf16", "fp16") == "bf16"
    assert coarser("fp32", "fp32") == "fp32"


def test_a_floor_applies_to_the_outputs_that_have_its_metric_and_at_least_one_must() -> None:
    logits, state = np.float32([[1, 2, 3], [3, 2, 1]]), np.float32([[1, 2]])
    accumulator = Accumulator(floor_criteria("top1", 0.9, "`p`"), "fp32")
    accumulator.cases = 1
    accumulator.add("state", measure(state, state), "a case")
    assert accumulator.faults() == ("`state` was not checked: the criteria set no limit for any of its metrics",)
    accumulator.add("logits", measure(logits, logits, compare_top1=True), "a case")
    assert accumulator.faults() == ()
    strict = msgspec.structs.replace(floor_criteria("top1", 0.9, "`p`"), every_output_is_checked=True)
    accumulator = Accumulator(strict, "fp32")
    accumulator.cases = 1
    accumulator.add("logits", measure(logits, logits, compare_top1=True), "a case")
    accumulator.add("state", measure(state, state), "a case")
    assert "`state` was not checked" in accumulator.faults()[0]


def test_the_largest_share_of_padding_is_read_from_a_file(tmp_path: Path) -> None:
    assert default_criteria().max_left_out == 0.9
    path = tmp_path / "criteria.toml"
    path.write_text("max_left_out = 0.97\n")
    criteria = load_criteria(path)
    assert criteria.max_left_out == 0.97
    assert criteria.tolerances == default_criteria().tolerances
    path.write_text("[fp16]\ncosine = 0.9\n")
    assert load_criteria(path).max_left_out == 0.9


@pytest.mark.parametrize("value", ["1.5", "-0.1", "true", '"most"', "nan"])
def test_a_share_of_padding_out_of_range_is_refused(value: str, tmp_path: Path) -> None:
    path = tmp_path / "criteria.toml"
    path.write_text(f"max_left_out = {value}\n")
    with pytest.raises(UsageError, match=r"`max_left_out` must be a number in \[0, 1\]"):
        load_criteria(path)
