"""Criteria: read whole, refused whole, and never hidden."""

from __future__ import annotations

from pathlib import Path

import pytest

from ryzen_compile.errors import RyzenError, UsageError
from ryzen_compile.numerics.criteria import coarser, default_criteria, load_criteria


def test_the_defaults_set_limits_for_every_precision() -> None:
    found = default_criteria()
    assert found.tolerances["fp32"].max_abs == 1e-4
    assert found.tolerances["fp32"].top1 == 1.0
    assert found.tolerances["fp16"].cosine == 0.9999
    assert found.tolerances["bf16"].cosine == 0.999
    assert found.tolerances["fp16"].top1 == found.tolerances["bf16"].top1 == 0.99
    assert found.tolerances["fp16"].max_abs is None


def test_a_file_replaces_the_tables_that_it_names(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[fp16]\ncosine = 0.5\n[fp16.outputs."last hidden"]\nmax_abs = 2\n')
    found = load_criteria(file)
    assert found.name == "mine.toml"
    assert found.tolerances["fp16"].cosine == 0.5
    assert found.tolerances["fp16"].relative_l2 is None
    assert found.tolerances["fp32"] == default_criteria().tolerances["fp32"]
    assert found.for_output("fp16", "other") == found.tolerances["fp16"]
    special = found.for_output("fp16", "last hidden")
    assert (special.cosine, special.max_abs) == (0.5, 2.0)


def test_limits_for_an_output_that_nothing_has_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        "[fp32]\nmax_abs = 1\n[fp32.outputs.nope]\nmax_abs = 1\n[fp16]\ncosine = 0.5\n[fp16.outputs.logits]\ncosine = 0.4\n"
    )
    found = load_criteria(file)
    found.check_outputs(["nope", "logits"])
    with pytest.raises(UsageError, match=r"`mine.toml`: \[fp32.outputs.nope\] names no output"):
        found.check_outputs(["logits"])


def test_all_faults_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(
        'fp32 = 3\n[fp15]\ncosine = 1\n[fp16]\ncosin = 0.9\ntop1 = 1.5\nmax_abs = "big"\nrelative_l2 = true\n'
        "[fp16.outputs.y]\nmax_abs = -1\n[bf16]\n"
    )
    with pytest.raises(UsageError) as caught:
        load_criteria(file)
    for part in (
        "`fp32` is a value, it should be a table",
        "there is no precision `fp15`: did you mean `fp16`?",
        "[fp16] there is no limit `cosin`: did you mean `cosine`?",
        "[fp16] `top1` is 1.5, it should be in [0, 1]",
        "[fp16] `max_abs` is 'big', it should be a number",
        "[fp16] `relative_l2` is True, it should be a number",
        "[fp16.outputs.y] `max_abs` is -1, it should be a finite number of at least 0",
        "[bf16] sets no limit",
    ):
        assert part in caught.value.message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "it holds no table"),
        ("[fp16", "is not TOML"),
        ("[fp16]\ncosine = nan", "it should be in [-1, 1]"),
        ("[fp16]\ncosine=0.9\noutputs = 3", "should hold tables"),
    ],
)
def test_a_file_that_judges_nothing_is_refused(tmp_path: Path, content: str, says: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(content)
    with pytest.raises(UsageError, match="bad.toml") as caught:
        load_criteria(file)
    assert says in caught.value.message


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RyzenError, match=r"missing.toml` cannot be read: No such file"):
        load_criteria(tmp_path / "missing.toml")


def test_flags_replace_one_limit_everywhere_and_are_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[fp32]\nmax_abs = 1\n[fp32.outputs.y]\ncosine = 0.1\n")
    found = load_criteria(file).override(cosine=0.7, top1=None)
    assert found.name == "mine.toml, with --cosine 0.7"
    assert {found.for_output(precision, "y").cosine for precision in ("fp32", "fp16", "bf16")} == {0.7}
    assert found.tolerances["fp32"].max_abs == 1.0
    assert default_criteria().override(cosine=None) == default_criteria()


def test_a_largest_difference_that_is_asked_for_is_meant_literally() -> None:
    assert default_criteria().tolerances["fp32"].max_abs_limit(1000.0) == pytest.approx(1e-2)
    assert default_criteria().tolerances["fp32"].max_abs_limit(2.0) == pytest.approx(1e-4)
    assert default_criteria().override(max_abs=1e-3).tolerances["fp32"].max_abs_limit(1000.0) == pytest.approx(1e-3)


def test_a_flag_out_of_range_is_refused() -> None:
    with pytest.raises(UsageError, match="`cosine` is 2, it should be in"):
        default_criteria().override(cosine=2.0)


def test_two_precisions_are_held_to_the_coarser() -> None:
    assert coarser("fp32", "fp16") == "fp16"
    assert coarser("bf16", "fp16") == "bf16"
    assert coarser("fp32", "fp32") == "fp32"
