"""Comparison over the grid of cases: results, faults, notes, and memory use."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import onnx
import pytest
from support.stage_counts import StageCounts

from ryzen_compile.errors import ShapeError, UsageError
from ryzen_compile.numerics.candidate import Candidate, match_interfaces
from ryzen_compile.numerics.comparison import Comparison, compare, comparison_diagnostics
from ryzen_compile.numerics.criteria import Criteria, Tolerances, default_criteria
from ryzen_compile.numerics.grid import CaseSource
from ryzen_compile.numerics.onnx_candidates import onnx_candidate
from ryzen_compile.progress import Progress
from ryzen_compile.report import text as report
from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.spec.interface import InputSpec, Interface, TensorSpec
from ryzen_compile.spec.profile import Profile

Arrays = dict[str, np.ndarray[Any, Any]]

VALUES = Interface(
    inputs=(InputSpec(name="x", dtype="float32", dims=("batch", 4)),),
    outputs=(TensorSpec(name="y", dtype="float32", dims=("batch", 4)),),
    batch="batch",
)
TOKENS = Interface(
    inputs=(
        InputSpec(name="ids", dtype="int64", dims=("batch", "seq"), role="ids", high=99),
        InputSpec(name="mask", dtype="int64", dims=("batch", "seq"), role="mask", padding_value=0),
    ),
    outputs=(TensorSpec(name="tokens", dtype="float32", dims=("batch", "seq", 8)),),
    batch="batch",
)
UP_TO_FOUR = Profile(min={"x": (1, 4)}, opt={"x": (2, 4)}, max={"x": (4, 4)})
UP_TO_4X6 = Profile(
    min={"ids": (1, 1), "mask": (1, 1)}, opt={"ids": (2, 3), "mask": (2, 3)}, max={"ids": (4, 6), "mask": (4, 6)}
)


def make_candidate(run: Callable[[Arrays], Arrays], interface: Interface | None = VALUES, **fields: Any) -> Candidate:
    @contextmanager
    def open_run() -> Iterator[Callable[[Any], Any]]:
        yield run

    return Candidate(name=run.__name__, description=f"{run.__name__}, in numpy", interface=interface, open=open_run, **fields)


def double(inputs: Arrays) -> Arrays:
    return {"y": inputs["x"] * 2}


def embed(inputs: Arrays) -> Arrays:
    table = np.random.default_rng(7).standard_normal((100, 8)).astype(np.float32)
    return {"tokens": table[inputs["ids"]] * inputs["mask"][:, :, None]}


def attend(inputs: Arrays, padding_value: int = 0) -> Arrays:
    """Return tokens that attend to all tokens of their row except those that the last columns of the mask mark as padding."""
    vectors = embed({**inputs, "mask": np.ones_like(inputs["ids"])})["tokens"]
    is_padding = inputs["mask"][:, -vectors.shape[1] :] == padding_value
    scores = np.where(is_padding[:, None, :], -1e9, vectors @ vectors.transpose(0, 2, 1))
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    return {"tokens": (weights / weights.sum(axis=2, keepdims=True) @ vectors).astype(np.float32)}


def run_comparison(
    candidate: Callable[[Arrays], Arrays],
    baseline: Callable[[Arrays], Arrays] = double,
    *,
    criteria: Criteria | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Comparison:
    options.setdefault("profiles", [UP_TO_FOUR])
    return compare(
        make_candidate(candidate),
        make_candidate(baseline),
        criteria=criteria or default_criteria(),
        case_source=CaseSource(**options),
        progress=progress,
    )


def test_progress_counts_the_cases() -> None:
    progress = StageCounts()
    result = run_comparison(double, progress=progress)
    assert len(result.cases) == 5
    assert progress.texts() == ["run the baseline: 5 of 5 cases", "compare: 5 of 5 cases"]


def find_metric(comparison: Comparison, name: str) -> Any:
    return next(metric for metric in comparison.accuracy.metrics if metric.name == name)


def test_equal_models_meet_the_criteria_over_the_whole_grid() -> None:
    result = run_comparison(double)
    assert result.met
    assert result.cases == (
        "min 1x4",
        "opt 2x4, identical rows",
        "opt 2x4, mixed rows",
        "max 4x4, identical rows",
        "max 4x4, mixed rows",
    )
    assert {metric.name: metric.worst for metric in result.accuracy.metrics} == pytest.approx(
        {
            "max_abs": 0,
            "relative_l2": 0,
            "cosine": 1,
            "batch_invariance_max_abs": 0,
            "batch_invariance_relative_l2": 0,
            "batch_invariance_cosine": 1,
        },
        abs=1e-15,
    )


def test_an_engine_that_is_wrong_in_row_2_only_fails_with_the_row() -> None:
    def wrong_in_row_2(inputs: Arrays) -> Arrays:
        y = inputs["x"] * 2
        y[2:3] += 0.5
        return {"y": y}

    result = run_comparison(wrong_in_row_2)
    assert not result.met
    assert find_metric(result, "batch_invariance_max_abs").case.startswith("max 4x4, identical rows, row 2")
    assert not find_metric(result, "batch_invariance_max_abs").met
    assert "max 4x4" in find_metric(result, "max_abs").case


def test_rows_that_the_baseline_itself_mixes_are_not_compared_alone_and_a_note_says_so() -> None:
    def mixes_rows(inputs: Arrays) -> Arrays:
        return {"y": inputs["x"] + inputs["x"].mean(axis=0, keepdims=True)}

    def mixes_rows_with_offset(inputs: Arrays) -> Arrays:
        return {"y": mixes_rows(inputs)["y"] + 0.5}

    note = "the baseline itself computes a row differently in a batch and alone: rows were not compared alone"
    result = run_comparison(mixes_rows, mixes_rows)
    assert result.met
    assert result.accuracy.notes == (note,)
    assert "alone" not in find_metric(result, "max_abs").case
    assert not run_comparison(mixes_rows_with_offset, mixes_rows).met


def test_rows_that_only_the_candidate_mixes_fail() -> None:
    def mixes_rows(inputs: Arrays) -> Arrays:
        return {"y": inputs["x"] * 2 + inputs["x"].mean(axis=0, keepdims=True) - inputs["x"][:1]}

    result = run_comparison(mixes_rows)
    assert not result.met
    assert result.accuracy.notes == ()


@pytest.mark.parametrize("body", ["s = ReduceSum <keepdims = 1> (x) y = Div (x, s)", "y = Softmax <axis = 0> (x)"])
def test_a_graph_that_mixes_rows_meets_the_criteria_against_itself(tmp_path: Path, body: str) -> None:
    file = tmp_path / "mix.onnx"
    text = f'<ir_version: 10, opset_import: ["" : 21]> mix (float[n, 4] x) => (float[n, 4] y) {{ {body} }}'
    onnx.save(onnx.parser.parse_model(text), file)
    result = compare(onnx_candidate(file), onnx_candidate(file), criteria=default_criteria())
    assert result.met
    assert len(result.accuracy.notes) == 1


def test_a_baseline_with_a_static_batch_is_not_run_on_single_rows_and_a_note_says_so() -> None:
    static = msgspec.structs.replace(VALUES, inputs=(InputSpec(name="x", dtype="float32", dims=(4, 4)),))
    only_four = Profile(min={"x": (4, 4)}, opt={"x": (4, 4)}, max={"x": (4, 4)})
    result = compare(
        make_candidate(double),
        make_candidate(double, static),
        criteria=default_criteria(),
        case_source=CaseSource(profiles=[only_four]),
    )
    assert result.met
    note = "rows were not compared with the same row alone: the baseline does not take a batch of 1"
    assert result.accuracy.notes == (note,)


def test_rows_that_differ_in_the_baseline_too_are_excluded_and_those_that_differ_only_in_the_candidate_fail() -> None:
    def overflows_in_row_1(inputs: Arrays) -> Arrays:
        y = inputs["x"] * 2
        y[1:2] = np.inf
        return {"y": y}

    result = run_comparison(overflows_in_row_1, overflows_in_row_1)
    assert result.met
    assert sum("rows were not compared alone" in note for note in result.accuracy.notes) == 1
    assert not run_comparison(overflows_in_row_1).met


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_non_finite_value_fails_regardless_of_the_limits(value: float) -> None:
    def overflows(inputs: Arrays) -> Arrays:
        y = inputs["x"] * 2
        y[-1, 3] = value
        return {"y": y}

    loose = Criteria(name="loose", tolerances=dict.fromkeys(("fp32", "fp16", "bf16"), Tolerances(max_abs=1e30, cosine=-1.0)))  # type: ignore[arg-type]
    result = run_comparison(overflows, criteria=loose)
    assert not result.met
    assert "where the baseline differs, first at [0, 3] (min 1x4) and 8 more" in result.accuracy.faults[0]


def test_non_finite_values_that_the_baseline_has_too_count_as_equal_with_a_note() -> None:
    def half_infinite(inputs: Arrays) -> Arrays:
        y = inputs["x"] * 2
        y[:, 0] = -np.inf
        return {"y": y}

    result = run_comparison(half_infinite, half_infinite)
    assert result.met
    assert any("count as equal" in note for note in result.accuracy.notes)


def with_padding_value(padding_value: Literal[0, 1] | None, dims: tuple[str, str] = ("batch", "seq")) -> Interface:
    ids, mask = TOKENS.inputs
    return msgspec.structs.replace(TOKENS, inputs=(ids, msgspec.structs.replace(mask, padding_value=padding_value, dims=dims)))


def garbage_at(
    is_garbage: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]], padding_value: int = 0
) -> Callable[[Arrays], Arrays]:
    """Return `attend` with other tokens where `is_garbage` of the last columns of the mask."""

    def attend_with_garbage(inputs: Arrays) -> Arrays:
        tokens = attend(inputs, padding_value)["tokens"]
        return {"tokens": np.where(is_garbage(inputs["mask"])[:, -tokens.shape[1] :, None], tokens + 3, tokens)}

    return attend_with_garbage


def compare_tokens(
    candidate: Callable[[Arrays], Arrays], baseline: Callable[[Arrays], Arrays], interface: Interface = TOKENS, **source: Any
) -> Comparison:
    return compare(
        make_candidate(candidate, interface),
        make_candidate(baseline, interface),
        criteria=default_criteria(),
        case_source=CaseSource(**(source or {"profiles": [UP_TO_4X6]})),
    )


@pytest.mark.parametrize("padding_value", [0, 1])
def test_padding_is_not_compared_and_valid_tokens_are(padding_value: Literal[0, 1]) -> None:
    interface = with_padding_value(padding_value)
    attend_all = partial(attend, padding_value=padding_value)
    attend_all.__name__ = "attend"  # type: ignore[attr-defined]
    garbage_in_padding = garbage_at(lambda mask: mask == padding_value, padding_value)
    garbage_in_tokens = garbage_at(lambda mask: mask != padding_value, padding_value)
    assert compare_tokens(garbage_in_padding, attend_all, interface).met
    assert not compare_tokens(garbage_in_tokens, attend_all, interface).met
    left_out = find_metric(compare_tokens(attend_all, attend_all, interface), "left_out")
    assert (left_out.case, left_out.required, left_out.met) == (
        "208 of 728 elements are padding and were not compared",
        "<= 0.9",
        True,
    )


@pytest.mark.parametrize("stated", [0, 1, None])
def test_nothing_is_left_out_by_a_padding_value_that_is_unknown_or_that_the_baseline_refutes(
    stated: Literal[0, 1] | None,
) -> None:
    interface = with_padding_value(stated)
    actual = 1 if stated == 0 else 0
    baseline = partial(attend, padding_value=actual)
    baseline.__name__ = "attend"  # type: ignore[attr-defined]
    for marked in (0, 1):
        result = compare_tokens(garbage_at(lambda mask, marked=marked: mask == marked, actual), baseline, interface)  # type: ignore[misc]
        assert not result.met
        assert all(metric.name != "left_out" for metric in result.accuracy.metrics)
    reason = "the model does not show which value marks padding" if stated is None else "the baseline does not confirm"
    assert any("left out as padding by `mask`" in note and reason in note for note in result.accuracy.notes)


def test_nothing_is_left_out_where_tokens_do_not_influence_each_other() -> None:
    def garbage_in_padding(inputs: Arrays) -> Arrays:
        return {"tokens": embed(inputs)["tokens"] + 3 * (inputs["mask"][:, :, None] == 0)}

    assert not compare_tokens(garbage_in_padding, embed).met


def test_a_comparison_of_almost_nothing_but_padding_fails_with_the_share() -> None:
    mask = np.zeros((2, 40), np.int64)
    mask[:, :2] = 1
    inputs = {"ids": np.arange(80).reshape(2, 40), "mask": mask}
    result = compare_tokens(attend, attend, inputs=[inputs])
    left_out = find_metric(result, "left_out")
    assert (left_out.worst, left_out.met, result.met) == (0.95, False, False)
    assert left_out.case == "608 of 640 elements are padding and were not compared"
    [diagnostic] = comparison_diagnostics([result])
    assert diagnostic.hint == ("give samples with less padding with --data, or raise `max_left_out` in the file of --criteria")
    raised = msgspec.structs.replace(default_criteria(), max_left_out=0.95)
    case_source = CaseSource(inputs=[inputs])
    candidate = make_candidate(attend, TOKENS)
    assert compare(candidate, candidate, criteria=raised, case_source=case_source).met


def test_the_last_columns_of_a_mask_over_past_and_new_tokens_apply() -> None:
    interface = with_padding_value(0, ("batch", "past+seq"))
    inputs = {"ids": np.arange(8).reshape(2, 4), "mask": np.array([[1] * 6, [1] * 4 + [0] * 2])}
    assert compare_tokens(garbage_at(lambda mask: mask == 0), attend, interface, inputs=[inputs]).met
    assert not compare_tokens(garbage_at(lambda mask: mask != 0), attend, interface, inputs=[inputs]).met


def test_left_padding_is_not_compared_either() -> None:
    inputs = {"ids": np.arange(8).reshape(2, 4), "mask": np.array([[1] * 4, [0, 0, 1, 1]])}
    for source in ({"inputs": [inputs]}, {"samples": [inputs], "profiles": [UP_TO_4X6]}):
        assert compare_tokens(garbage_at(lambda mask: mask == 0), attend, **source).met
        assert not compare_tokens(garbage_at(lambda mask: mask != 0), attend, **source).met


def test_an_output_without_declared_dims_has_no_padding() -> None:
    interface = msgspec.structs.replace(TOKENS, outputs=(TensorSpec(name="tokens", dtype="float32", dims=None),))
    assert not compare_tokens(garbage_at(lambda mask: mask == 0), attend, interface).met


def test_an_output_per_row_is_not_treated_as_one_per_token() -> None:
    pooled = msgspec.structs.replace(TOKENS, outputs=(TensorSpec(name="pooled", dtype="float32", dims=("batch", 6)),))

    def sums(inputs: Arrays) -> Arrays:
        return {"pooled": np.repeat(embed(inputs)["tokens"].sum(axis=(1, 2))[:, None], 6, axis=1)}

    def wrong_at_the_end(inputs: Arrays) -> Arrays:
        pooled = sums(inputs)["pooled"].copy()
        pooled[:, 5] += 1
        return {"pooled": pooled}

    result = compare(
        make_candidate(wrong_at_the_end, pooled),
        make_candidate(sums, pooled),
        criteria=default_criteria(),
        case_source=CaseSource(profiles=[UP_TO_4X6]),
    )
    assert not find_metric(result, "max_abs").met
    assert find_metric(result, "max_abs").worst == pytest.approx(1.0)


def test_a_comparison_without_cases_outputs_or_nonzero_elements_fails() -> None:
    def zero(inputs: Arrays) -> Arrays:
        return {"y": inputs["x"] * 0}

    def none(inputs: Arrays) -> Arrays:
        return {}

    def empty(inputs: Arrays) -> Arrays:
        return {"y": inputs["x"][:, :0]}

    for result, message in (
        (run_comparison(double, inputs=[]), "there are no cases"),
        (run_comparison(none, none), "there are no outputs"),
        (run_comparison(zero, zero), "every output is zero"),
        (run_comparison(empty, empty), "no element was compared: in every case it is empty, masked, fill or non-finite"),
    ):
        assert not result.met
        assert message in result.accuracy.faults[0]


def test_an_output_that_is_finite_in_no_case_fails_and_one_that_is_in_some_has_a_note() -> None:
    def both(inputs: Arrays) -> Arrays:
        return {"y": inputs["x"] * 2, "z": np.maximum(inputs["x"], 0)}

    nan, one = np.full((3, 4), np.nan, np.float32), np.ones((3, 4), np.float32)
    result = run_comparison(both, both, inputs=[{"x": nan}, {"x": nan}])
    assert not result.met
    assert [fault.partition(" in every case")[0] for fault in result.accuracy.faults] == [
        f"`{name}`: no element was compared:" for name in "yz"
    ]
    assert b"NaN," not in msgspec.json.encode(result.accuracy.metrics)
    result = run_comparison(both, both, inputs=[{"x": nan}, {"x": one}])
    assert result.met
    assert any("`y`: no element was compared in 1 of 2 comparisons" in note for note in result.accuracy.notes)


def test_an_output_of_only_zeros_has_a_note() -> None:
    def with_zeros(inputs: Arrays) -> Arrays:
        return {"y": inputs["x"] * 2, "z": inputs["x"] * 0}

    result = run_comparison(with_zeros, with_zeros)
    assert result.met
    assert result.accuracy.notes == ("`z` is zero in the candidate and in the baseline in every case: it proves nothing",)


def test_an_output_without_an_applicable_limit_fails() -> None:
    def flags(inputs: Arrays) -> Arrays:
        return {"y": inputs["x"][:, :1] + 3}

    only_cosine = Criteria(name="mine", tolerances=dict.fromkeys(("fp32", "fp16", "bf16"), Tolerances(cosine=0.9)))  # type: ignore[arg-type]
    result = run_comparison(flags, flags, criteria=only_cosine)
    assert not result.met
    assert "`y` was not checked" in result.accuracy.faults[0]


def test_a_nonzero_half_output_against_a_zero_baseline_fails() -> None:
    def zero(inputs: Arrays) -> Arrays:
        return {"y": inputs["x"] * 0}

    result = compare(
        make_candidate(double, precision="fp16"),
        make_candidate(zero),
        criteria=default_criteria(),
        case_source=CaseSource(profiles=[UP_TO_FOUR]),
    )
    assert result.precision == "fp16"
    assert "where the whole baseline is zero" in result.accuracy.faults[0]


def test_missing_outputs_and_different_shapes_are_reported() -> None:
    def two(inputs: Arrays) -> Arrays:
        return {"y": inputs["x"] * 2, "z": inputs["x"]}

    def wide(inputs: Arrays) -> Arrays:
        return {"y": np.repeat(inputs["x"] * 2, 2, axis=1)}

    assert (
        "`z` is an output of the baseline and missing in the candidate (min 1x4)"
        in run_comparison(double, two).accuracy.faults[0]
    )
    assert "`z` is not an output of the baseline" in run_comparison(two, double).accuracy.faults[0]
    assert "`y` has the shape [1, 8], the baseline has [1, 4]" in run_comparison(wide, double).accuracy.faults[0]


def test_integers_that_differ_fail_with_their_index() -> None:
    def argmax(inputs: Arrays) -> Arrays:
        return {"y": inputs["x"].argmax(axis=1)}

    def argmin(inputs: Arrays) -> Arrays:
        return {"y": inputs["x"].argmin(axis=1)}

    assert run_comparison(argmax, argmax).met
    result = find_metric(run_comparison(argmin, argmax), "unequal")
    assert (result.required, result.met) == ("== 0", False)
    assert "at [" in result.case


def test_top1_is_the_share_over_all_cases() -> None:
    classifier = msgspec.structs.replace(VALUES, task="classifier")

    def swapped_once(inputs: Arrays) -> Arrays:
        y = double(inputs)["y"]
        if len(y) == 1:
            y = -y
        return {"y": y}

    result = compare(
        make_candidate(swapped_once, classifier, precision="fp16"),
        make_candidate(double, classifier),
        criteria=default_criteria(),
        case_source=CaseSource(profiles=[UP_TO_FOUR]),
    )
    rows = 1 + 2 + 2 + 4 + 4
    assert find_metric(result, "top1").worst == pytest.approx((rows - 1) / rows)
    assert find_metric(result, "top1").case == f"1 of {rows} rows differ, first in min 1x4, at [0]"
    assert not find_metric(result, "top1").met


def test_the_limit_of_large_outputs_is_relative_to_their_magnitude_unless_a_flag_sets_it() -> None:
    def large(inputs: Arrays) -> Arrays:
        return {"y": (inputs["x"] + 3) * 10000}

    def nearly(inputs: Arrays) -> Arrays:
        return {"y": large(inputs)["y"] + np.float32(0.125)}

    assert run_comparison(nearly, large).met
    result = find_metric(run_comparison(nearly, large, criteria=default_criteria().override(max_abs=1e-3)), "max_abs")
    assert (result.required, result.met) == ("<= 0.001", False)


def test_the_inputs_of_the_user_are_compared_unchanged() -> None:
    result = run_comparison(double, inputs=[{"x": np.ones((3, 4), np.float32)}, {"x": np.ones((1, 4), np.float32)}])
    assert result.cases == ("sample 1 3x4", "sample 2 1x4")
    assert result.met


def test_several_profiles_are_numbered() -> None:
    single = Profile(min={"x": (1, 4)}, opt={"x": (1, 4)}, max={"x": (1, 4)})
    assert run_comparison(double, profiles=[single, UP_TO_FOUR]).cases[:2] == ("profile 1 at 1x4", "profile 2 min 1x4")


ALL_TYPES = """bool uint8 int16 uint64 float16 float64 complex64 bfloat16 float8_e4m3fn float8_e4m3fnuz float8_e5m2
float4_e2m1fn int4 uint4 int2""".split()


@pytest.mark.parametrize("dtype", ALL_TYPES)
def test_every_element_type_is_compared(dtype: str) -> None:
    def identity(inputs: Arrays) -> Arrays:
        assert inputs["x"].dtype.name == dtype
        return {"y": inputs["x"]}

    def reverse(inputs: Arrays) -> Arrays:
        return {"y": inputs["x"][::-1].copy()}

    inputs = [{"x": np.array([1, 0, 0]).astype(numpy_dtype(dtype))}] * 2
    interface = Interface(
        inputs=(InputSpec(name="x", dtype=dtype, dims=(3,)),), outputs=(TensorSpec(name="y", dtype=dtype, dims=(3,)),)
    )
    assert compare(
        make_candidate(identity, interface),
        make_candidate(identity, interface),
        criteria=default_criteria(),
        case_source=CaseSource(inputs=inputs),
    ).met
    assert not compare(
        make_candidate(reverse, interface),
        make_candidate(identity, interface),
        criteria=default_criteria(),
        case_source=CaseSource(inputs=inputs),
    ).met


def test_strings_of_any_length_are_compared(tmp_path: Path) -> None:
    file = tmp_path / "words.onnx"
    text = '<ir_version: 10, opset_import: ["" : 21]> words (string[N] x) => (string[N] y) { y = Identity (x) }'
    onnx.save(onnx.parser.parse_model(text), file)
    inputs = [{"x": np.array(["a", "naïve"])}, {"x": np.array(["something longer", ""])}]
    assert compare(
        onnx_candidate(file), onnx_candidate(file), criteria=default_criteria(), case_source=CaseSource(inputs=inputs)
    ).met


def test_the_common_interface_combines_what_either_model_declares() -> None:
    plain = Interface(
        inputs=(InputSpec(name="x", dtype="float32", dims=("n", 4)),),
        outputs=(TensorSpec(name="y", dtype="float32", dims=("n", 4)),),
    )
    detailed = msgspec.structs.replace(
        VALUES,
        inputs=(InputSpec(name="x", dtype="float16", dims=("batch", "width"), low=5, high=6),),
        task="classifier",
        max_sizes={"batch": 3, "width": 9},
    )
    _, _, interface = match_interfaces(make_candidate(double, plain), make_candidate(double, detailed))
    assert interface.inputs == (InputSpec(name="x", dtype="float32", dims=("batch", 4), low=5, high=6),)
    assert interface.outputs == VALUES.outputs
    assert (interface.batch, interface.task) == ("batch", "classifier")
    _, _, interface = match_interfaces(make_candidate(double), make_candidate(double, detailed))
    assert interface.inputs == VALUES.inputs
    assert (interface.task, interface.max_sizes) == ("classifier", {"batch": 3})
    _, _, interface = match_interfaces(make_candidate(double), make_candidate(double, plain))
    assert interface == VALUES
    recorded: list[Arrays] = []

    def record(inputs: Arrays) -> Arrays:
        recorded.append(inputs)
        return double(inputs)

    assert (
        compare(make_candidate(record, plain), make_candidate(double, detailed), criteria=default_criteria()).cases[-1]
        == "max 3x4, mixed rows"
    )
    assert all(inputs["x"].min() >= 5 and inputs["x"].max() <= 6 for inputs in recorded)


def test_models_with_different_inputs_are_rejected() -> None:
    with pytest.raises(ShapeError, match="`double` takes the inputs `x`, `embed` takes `ids`, `mask`"):
        compare(make_candidate(double), make_candidate(embed, TOKENS), criteria=default_criteria())
    with pytest.raises(UsageError, match="neither `double` nor `double` declares its inputs"):
        compare(make_candidate(double, None), make_candidate(double, None), criteria=default_criteria())


def test_an_error_of_a_candidate_is_raised_unchanged() -> None:
    def fails(inputs: Arrays) -> Arrays:
        raise ShapeError("`x` is 1x4")

    with pytest.raises(ShapeError, match="`x` is 1x4"):
        run_comparison(fails)


def test_polygraphy_prints_nothing_and_its_configuration_is_restored(capfd: pytest.CaptureFixture[str]) -> None:
    from polygraphy import config
    from polygraphy.logger import G_LOGGER

    threshold = config.ARRAY_SWAP_THRESHOLD_MB
    with G_LOGGER.verbosity(G_LOGGER.EXTRA_VERBOSE):
        before = G_LOGGER.module_severity.trie
        run_comparison(double)
        assert G_LOGGER.module_severity.trie == before

        def fails(inputs: Arrays) -> Arrays:
            raise ShapeError("no")

        with pytest.raises(ShapeError):
            run_comparison(fails)
        assert G_LOGGER.module_severity.trie == before
    assert threshold == config.ARRAY_SWAP_THRESHOLD_MB
    assert capfd.readouterr() == ("", "")


def test_graphs_are_compared_without_importing_torch(tmp_path: Path) -> None:
    file = tmp_path / "twice.onnx"
    text = '<ir_version: 10, opset_import: ["" : 21]> twice (float[N] x) => (float[N] y) { y = Add (x, x) }'
    onnx.save(onnx.parser.parse_model(text), file)
    script = f"""
import sys
from ryzen_compile.numerics.criteria import default_criteria
from ryzen_compile.numerics.comparison import compare
from ryzen_compile.numerics.candidate_lookup import find_candidate
assert compare(find_candidate({str(file)!r}), find_candidate({str(file)!r}), criteria=default_criteria()).met
print([name for name in ("torch", "tensorrt", "tensorrt_rtx") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_candidates_are_released_even_if_one_of_them_fails() -> None:
    log: list[str] = []

    @contextmanager
    def open_broken() -> Iterator[Callable[[Any], Any]]:
        log.append("open")
        try:
            yield lambda inputs: {"y": inputs["missing"]}
        finally:
            log.append("closed")

    broken = Candidate(name="broken", description="broken", interface=VALUES, open=open_broken)
    with pytest.raises(KeyError):
        compare(broken, make_candidate(double), criteria=default_criteria(), case_source=CaseSource(profiles=[UP_TO_FOUR]))
    assert log == ["open", "closed"]


def test_only_one_case_is_in_memory_at_a_time() -> None:
    references: list[weakref.ref[np.ndarray[Any, Any]]] = []
    alive_counts: list[int] = []

    def watch(inputs: Arrays) -> Arrays:
        y = inputs["x"] * 2
        references.append(weakref.ref(y))
        alive_counts.append(sum(reference() is not None for reference in references))
        return {"y": y}

    compare(
        make_candidate(watch),
        make_candidate(double),
        criteria=default_criteria(),
        case_source=CaseSource(profiles=[UP_TO_FOUR] * 5),
    )
    assert len(alive_counts) == 25
    assert max(alive_counts) <= 2


def test_the_record_survives_json_and_the_report_shows_it() -> None:
    result = run_comparison(double, inputs=[{"x": np.ones((3, 4), np.float32)}])
    assert msgspec.json.decode(msgspec.json.encode(result), type=Comparison) == result
    text = report.format_comparison(result)
    assert "double, in numpy\n  against double, in numpy\n" in text
    assert "the defaults of ryzen-compile, fp32: max_abs 0.0001, max_abs_per_magnitude 1e-05, relative_l2 0.0001" in text
    assert text.endswith("MET: double against double")

    def wrong(inputs: Arrays) -> Arrays:
        return {"y": -inputs["x"]}

    text = report.format_comparison(run_comparison(wrong))
    assert "NOT MET" in text.splitlines()[-1]
    assert "FAULT" not in text
    first = result.accuracy.metrics[0]
    rows = tuple(msgspec.structs.replace(first, output=f"y{index}") for index in range(33))
    many = msgspec.structs.replace(result.accuracy, metrics=rows)
    assert "and 3 further metrics, all met" in report.format_comparison(msgspec.structs.replace(result, accuracy=many))
    assert any(line.split()[1:6] == ["cosine", "-1", ">=", "0.99999", "NOT"] for line in text.splitlines())


@pytest.mark.parametrize("fill", [-1e9, float(np.finfo(np.float32).min)])
@pytest.mark.parametrize("difference", [0.0, 1e-6])
def test_random_values_next_to_the_fill_value_of_a_mask_do_not_meet_the_criteria(fill: float, difference: float) -> None:
    def make_run(seed: int, fill: float) -> Callable[[Arrays], Arrays]:
        def fill_mask(inputs: Arrays) -> Arrays:
            y = np.random.default_rng(seed).standard_normal((*inputs["x"].shape[:1], 128, 8)).astype(np.float32)
            y[..., -1] = fill
            return {"y": y}

        return fill_mask

    inputs = [{"x": np.ones((4, 4), np.float32)}]
    result = run_comparison(make_run(1, fill * (1 - difference)), make_run(2, fill), inputs=inputs)
    assert not result.met
    assert {name: find_metric(result, name).met for name in ("max_abs", "relative_l2", "cosine")} == {
        "max_abs": False,
        "relative_l2": False,
        "cosine": False,
    }
    assert any("512 outliers" in note for note in result.accuracy.notes)
    result = run_comparison(make_run(1, fill), make_run(1, fill), inputs=inputs)
    assert (result.met, result.accuracy.faults) == (True, ())


def test_an_output_of_only_the_fill_value_is_not_compared() -> None:
    def fill_mask(inputs: Arrays) -> Arrays:
        return {"y": np.full_like(inputs["x"], np.finfo(np.float32).min)}

    result = run_comparison(fill_mask, fill_mask)
    assert not result.met
    assert "no element was compared" in result.accuracy.faults[0]


@pytest.mark.parametrize("value", [1e300, 1.7e308])
def test_numbers_that_overflow_a_metric_fail_and_the_record_survives_json(value: float) -> None:
    def large(inputs: Arrays) -> Arrays:
        return {"y": np.full((1, 4), value)}

    def opposite(inputs: Arrays) -> Arrays:
        return {"y": np.full((1, 4), -value)}

    only_cosine = Criteria(name="mine", tolerances=dict.fromkeys(("fp32", "fp16", "bf16"), Tolerances(cosine=0.9)))  # type: ignore[arg-type]
    for criteria in (default_criteria(), only_cosine):
        result = run_comparison(opposite, large, criteria=criteria, inputs=[{"x": np.ones((1, 4), np.float32)}])
        assert not result.met
        assert (find_metric(result, "cosine").worst, find_metric(result, "cosine").met) == (-1.0, False)
        assert all(np.isfinite(metric.worst) for metric in result.accuracy.metrics)
        assert msgspec.json.decode(msgspec.json.encode(result), type=Comparison) == result
        assert any("overflows float64" in fault for fault in result.accuracy.faults) == (value > 1e308)


def test_a_non_finite_difference_fails_even_without_a_limit() -> None:
    def tiny(inputs: Arrays) -> Arrays:
        return {"y": np.full((1, 4), 1e-300)}

    def large(inputs: Arrays) -> Arrays:
        return {"y": np.full((1, 4), 1e300)}

    only_cosine = Criteria(name="mine", tolerances=dict.fromkeys(("fp32", "fp16", "bf16"), Tolerances(cosine=0.9)))  # type: ignore[arg-type]
    result = run_comparison(large, tiny, criteria=only_cosine, inputs=[{"x": np.ones((1, 4), np.float32)}])
    assert not result.met
    assert find_metric(result, "cosine").met
    assert "relative_l2 overflows float64" in result.accuracy.faults[0]
    assert msgspec.json.decode(msgspec.json.encode(result), type=Comparison) == result
