"""A comparison over the grid: what it finds, what it refuses to pass, and what it holds in memory."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest

from ryzen_compile.cli import report
from ryzen_compile.errors import ShapeError, UsageError
from ryzen_compile.numerics.candidate import Candidate, match_interfaces
from ryzen_compile.numerics.comparison import Comparison, compare
from ryzen_compile.numerics.criteria import Criteria, Tolerances, default_criteria
from ryzen_compile.numerics.onnx_candidates import onnx_candidate
from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.spec.interface import InputSpec, Interface, TensorSpec
from ryzen_compile.spec.profile import Profile

Feed = dict[str, np.ndarray[Any, Any]]

VALUES = Interface(
    inputs=(InputSpec(name="x", dtype="float32", dims=("batch", 4)),),
    outputs=(TensorSpec(name="y", dtype="float32", dims=("batch", 4)),),
    batch="batch",
)
TOKENS = Interface(
    inputs=(
        InputSpec(name="ids", dtype="int64", dims=("batch", "seq"), role="ids", high=99),
        InputSpec(name="mask", dtype="int64", dims=("batch", "seq"), role="mask"),
    ),
    outputs=(TensorSpec(name="tokens", dtype="float32", dims=("batch", "seq", 8)),),
    batch="batch",
)
UP_TO_FOUR = Profile(min={"x": (1, 4)}, opt={"x": (2, 4)}, max={"x": (4, 4)})
UP_TO_4X6 = Profile(
    min={"ids": (1, 1), "mask": (1, 1)}, opt={"ids": (2, 3), "mask": (2, 3)}, max={"ids": (4, 6), "mask": (4, 6)}
)


def subject(run: Callable[[Feed], Feed], interface: Interface | None = VALUES, **fields: Any) -> Candidate:
    @contextmanager
    def opened() -> Iterator[Callable[[Any], Any]]:
        yield run

    return Candidate(name=run.__name__, description=f"{run.__name__}, in numpy", interface=interface, open=opened, **fields)


def double(feed: Feed) -> Feed:
    return {"y": feed["x"] * 2}


def embed(feed: Feed) -> Feed:
    table = np.random.default_rng(7).standard_normal((100, 8)).astype(np.float32)
    return {"tokens": table[feed["ids"]] * feed["mask"][:, :, None]}


def run(
    one: Callable[[Feed], Feed], other: Callable[[Feed], Feed] = double, *, criteria: Criteria | None = None, **options: Any
) -> Comparison:
    options.setdefault("profiles", [UP_TO_FOUR])
    return compare(subject(one), subject(other), criteria=criteria or default_criteria(), **options)


def metric(comparison: Comparison, name: str) -> Any:
    return {one.name: one for one in comparison.accuracy.metrics}[name]


def test_equal_models_meet_the_criteria_over_the_whole_grid() -> None:
    found = run(double)
    assert found.met
    assert found.cases == (
        "min 1x4",
        "opt 2x4, identical rows",
        "opt 2x4, mixed rows",
        "max 4x4, identical rows",
        "max 4x4, mixed rows",
    )
    assert {one.name: one.worst for one in found.accuracy.metrics} == pytest.approx(
        {"max_abs": 0, "relative_l2": 0, "cosine": 1, "slot_max_abs": 0, "slot_relative_l2": 0, "slot_cosine": 1}, abs=1e-15
    )


def test_an_engine_that_is_wrong_in_slot_2_only_is_caught_and_placed() -> None:
    def wrong_in_slot_2(feed: Feed) -> Feed:
        y = feed["x"] * 2
        y[2:3] += 0.5
        return {"y": y}

    found = run(wrong_in_slot_2)
    assert not found.met
    assert metric(found, "slot_max_abs").case.startswith("max 4x4, identical rows, row 2")
    assert not metric(found, "slot_max_abs").met
    assert "max 4x4" in metric(found, "max_abs").case


def test_rows_that_the_baseline_itself_mixes_are_not_compared_alone_and_that_is_told() -> None:
    def leaks(feed: Feed) -> Feed:
        return {"y": feed["x"] + feed["x"].mean(axis=0, keepdims=True)}

    def leaks_and_is_off(feed: Feed) -> Feed:
        return {"y": leaks(feed)["y"] + 0.5}

    told = "the baseline itself computes a row otherwise in a batch than alone: rows were not compared alone"
    found = run(leaks, leaks)
    assert found.met
    assert found.accuracy.notes == (told,)
    assert "alone" not in metric(found, "max_abs").case
    assert not run(leaks_and_is_off, leaks).met


def test_rows_that_leak_in_the_subject_only_are_caught() -> None:
    def leaks(feed: Feed) -> Feed:
        return {"y": feed["x"] * 2 + feed["x"].mean(axis=0, keepdims=True) - feed["x"][:1]}

    found = run(leaks)
    assert not found.met
    assert found.accuracy.notes == ()


@pytest.mark.parametrize("body", ["s = ReduceSum <keepdims = 1> (x) y = Div (x, s)", "y = Softmax <axis = 0> (x)"])
def test_a_graph_that_mixes_rows_meets_the_criteria_against_itself(tmp_path: Path, body: str) -> None:
    file = tmp_path / "mix.onnx"
    text = f'<ir_version: 10, opset_import: ["" : 21]> mix (float[n, 4] x) => (float[n, 4] y) {{ {body} }}'
    onnx.save(onnx.parser.parse_model(text), file)
    found = compare(onnx_candidate(file), onnx_candidate(file), criteria=default_criteria())
    assert found.met
    assert len(found.accuracy.notes) == 1


def test_a_baseline_with_a_fixed_batch_is_not_asked_for_single_rows_and_that_is_told() -> None:
    fixed = msgspec.structs.replace(VALUES, inputs=(InputSpec(name="x", dtype="float32", dims=(4, 4)),))
    only_four = Profile(min={"x": (4, 4)}, opt={"x": (4, 4)}, max={"x": (4, 4)})
    found = compare(subject(double), subject(double, fixed), criteria=default_criteria(), profiles=[only_four])
    assert found.met
    assert found.accuracy.notes == ("rows were not compared with the same row alone: double does not take a batch of 1",)


def test_slots_that_differ_in_the_baseline_too_are_left_out_and_those_of_the_subject_alone_fail() -> None:
    def overflows_in_slot_1(feed: Feed) -> Feed:
        y = feed["x"] * 2
        y[1:2] = np.inf
        return {"y": y}

    found = run(overflows_in_slot_1, overflows_in_slot_1)
    assert found.met
    assert sum("rows were not compared alone" in note for note in found.accuracy.notes) == 1
    assert not run(overflows_in_slot_1).met


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_fails_whatever_the_limits(value: float) -> None:
    def overflows(feed: Feed) -> Feed:
        y = feed["x"] * 2
        y[-1, 3] = value
        return {"y": y}

    lax = Criteria(name="lax", tolerances=dict.fromkeys(("fp32", "fp16", "bf16"), Tolerances(max_abs=1e30, cosine=-1.0)))  # type: ignore[arg-type]
    found = run(overflows, criteria=lax)
    assert not found.met
    assert "unlike the baseline, first at [0, 3] (min 1x4), and 8 times more" in found.accuracy.faults[0]


def test_what_the_baseline_has_too_counts_as_equal_and_is_told() -> None:
    def half_infinite(feed: Feed) -> Feed:
        y = feed["x"] * 2
        y[:, 0] = -np.inf
        return {"y": y}

    found = run(half_infinite, half_infinite)
    assert found.met
    assert any("count as equal" in note for note in found.accuracy.notes)


def test_masked_tokens_are_not_judged_and_others_are() -> None:
    def garbage_in_padding(feed: Feed) -> Feed:
        tokens = embed(feed)["tokens"]
        return {"tokens": np.where(feed["mask"][:, :, None] == 1, tokens, np.float32(1e9))}

    def garbage_at_the_start(feed: Feed) -> Feed:
        tokens = embed(feed)["tokens"].copy()
        tokens[:, 0] = 1e9
        return {"tokens": tokens}

    def judged(one: Callable[[Feed], Feed]) -> Comparison:
        return compare(subject(one, TOKENS), subject(embed, TOKENS), criteria=default_criteria(), profiles=[UP_TO_4X6])

    assert judged(garbage_in_padding).met
    assert not judged(garbage_at_the_start).met


def test_of_a_mask_over_past_and_new_tokens_the_last_columns_count() -> None:
    decoder = msgspec.structs.replace(
        TOKENS,
        inputs=(
            InputSpec(name="ids", dtype="int64", dims=("batch", "seq"), role="ids", high=99),
            InputSpec(name="mask", dtype="int64", dims=("batch", "past+seq"), role="mask"),
        ),
    )

    def tokens(feed: Feed, padding: float) -> Feed:
        new = feed["mask"][:, 2:, None]
        return {"tokens": np.where(new == 1, embed({"ids": feed["ids"], "mask": feed["mask"][:, 2:]})["tokens"], padding)}

    def plain(feed: Feed) -> Feed:
        return tokens(feed, 0.0)

    def garbage(feed: Feed) -> Feed:
        return tokens(feed, 1e9)

    feed = {"ids": np.arange(8).reshape(2, 4), "mask": np.array([[1] * 6, [1] * 4 + [0] * 2])}
    found = compare(subject(garbage, decoder), subject(plain, decoder), criteria=default_criteria(), inputs=[feed])
    assert found.met


def test_an_output_by_row_is_not_taken_for_one_by_token() -> None:
    pooled = msgspec.structs.replace(TOKENS, outputs=(TensorSpec(name="pooled", dtype="float32", dims=("batch", 6)),))

    def sums(feed: Feed) -> Feed:
        return {"pooled": np.repeat(embed(feed)["tokens"].sum(axis=(1, 2))[:, None], 6, axis=1)}

    def wrong_at_the_end(feed: Feed) -> Feed:
        found = sums(feed)["pooled"].copy()
        found[:, 5] += 1
        return {"pooled": found}

    found = compare(subject(wrong_at_the_end, pooled), subject(sums, pooled), criteria=default_criteria(), profiles=[UP_TO_4X6])
    assert not metric(found, "max_abs").met
    assert metric(found, "max_abs").worst == pytest.approx(1.0)


def test_no_case_no_output_only_zeros_and_only_padding_all_fail() -> None:
    def zero(feed: Feed) -> Feed:
        return {"y": feed["x"] * 0}

    def none(feed: Feed) -> Feed:
        return {}

    def empty(feed: Feed) -> Feed:
        return {"y": feed["x"][:, :0]}

    for found, says in (
        (run(double, inputs=[]), "there was no case"),
        (run(none, none), "there is no output"),
        (run(zero, zero), "every output is zero"),
        (run(empty, empty), "it is empty, masked, fill or not finite in every case"),
    ):
        assert not found.met
        assert says in found.accuracy.faults[0]


def test_an_output_that_is_never_finite_in_any_case_fails_and_one_that_is_in_some_is_told() -> None:
    def both(feed: Feed) -> Feed:
        return {"y": feed["x"] * 2, "z": np.maximum(feed["x"], 0)}

    nan, one = np.full((3, 4), np.nan, np.float32), np.ones((3, 4), np.float32)
    found = run(both, both, inputs=[{"x": nan}, {"x": nan}])
    assert not found.met
    assert [fault.partition(" it is")[0] for fault in found.accuracy.faults] == [
        f"`{name}`: nothing of it was compared:" for name in "yz"
    ]
    assert b"NaN," not in msgspec.json.encode(found.accuracy.metrics)
    found = run(both, both, inputs=[{"x": nan}, {"x": one}])
    assert found.met
    assert any("`y`: nothing of it was compared in 1 of 2 comparisons" in note for note in found.accuracy.notes)


def test_one_output_of_zeros_beside_another_is_told() -> None:
    def with_zeros(feed: Feed) -> Feed:
        return {"y": feed["x"] * 2, "z": feed["x"] * 0}

    found = run(with_zeros, with_zeros)
    assert found.met
    assert found.accuracy.notes == ("`z` is zero in the subject and in the baseline, in every case: it says nothing",)


def test_an_output_that_no_limit_speaks_of_fails() -> None:
    def flags(feed: Feed) -> Feed:
        return {"y": feed["x"][:, :1] + 3}

    only_cosine = Criteria(name="mine", tolerances=dict.fromkeys(("fp32", "fp16", "bf16"), Tolerances(cosine=0.9)))  # type: ignore[arg-type]
    found = run(flags, flags, criteria=only_cosine)
    assert not found.met
    assert "`y` was not judged" in found.accuracy.faults[0]


def test_a_half_output_that_is_not_zero_where_the_baseline_is_fails() -> None:
    def zero(feed: Feed) -> Feed:
        return {"y": feed["x"] * 0}

    found = compare(subject(double, precision="fp16"), subject(zero), criteria=default_criteria(), profiles=[UP_TO_FOUR])
    assert found.precision == "fp16"
    assert "where the baseline is zero throughout" in found.accuracy.faults[0]


def test_missing_outputs_and_other_shapes_are_named() -> None:
    def two(feed: Feed) -> Feed:
        return {"y": feed["x"] * 2, "z": feed["x"]}

    def wide(feed: Feed) -> Feed:
        return {"y": np.repeat(feed["x"] * 2, 2, axis=1)}

    assert "`z` is an output of the baseline, and the subject lacks it (min 1x4)" in run(double, two).accuracy.faults[0]
    assert "`z` is no output of the baseline" in run(two, double).accuracy.faults[0]
    assert "`y` has the shape [1, 8], the baseline [1, 4]" in run(wide, double).accuracy.faults[0]


def test_integers_that_differ_fail_with_their_place() -> None:
    def argmax(feed: Feed) -> Feed:
        return {"y": feed["x"].argmax(axis=1)}

    def argmin(feed: Feed) -> Feed:
        return {"y": feed["x"].argmin(axis=1)}

    assert run(argmax, argmax).met
    found = metric(run(argmin, argmax), "unequal")
    assert (found.required, found.met) == ("== 0", False)
    assert "at [" in found.case


def test_top_1_is_the_share_over_all_cases() -> None:
    classifier = msgspec.structs.replace(VALUES, task="classifier")

    def swapped_once(feed: Feed) -> Feed:
        y = double(feed)["y"]
        if len(y) == 1:
            y = -y
        return {"y": y}

    found = compare(
        subject(swapped_once, classifier, precision="fp16"),
        subject(double, classifier),
        criteria=default_criteria(),
        profiles=[UP_TO_FOUR],
    )
    rows = 1 + 2 + 2 + 4 + 4
    assert metric(found, "top1").worst == pytest.approx((rows - 1) / rows)
    assert metric(found, "top1").case == f"1 of {rows}, first min 1x4, at [0]"
    assert not metric(found, "top1").met


def test_large_outputs_are_held_to_their_magnitude_and_a_flag_to_its_number() -> None:
    def large(feed: Feed) -> Feed:
        return {"y": (feed["x"] + 3) * 10000}

    def nearly(feed: Feed) -> Feed:
        return {"y": large(feed)["y"] + np.float32(0.125)}

    assert run(nearly, large).met
    found = metric(run(nearly, large, criteria=default_criteria().override(max_abs=1e-3)), "max_abs")
    assert (found.required, found.met) == ("<= 0.001", False)


def test_the_users_own_inputs_are_compared_as_they_are() -> None:
    found = run(double, inputs=[{"x": np.ones((3, 4), np.float32)}, {"x": np.ones((1, 4), np.float32)}])
    assert found.cases == ("sample 1 3x4", "sample 2 1x4")
    assert found.met


def test_several_profiles_are_numbered() -> None:
    one = Profile(min={"x": (1, 4)}, opt={"x": (1, 4)}, max={"x": (1, 4)})
    assert run(double, profiles=[one, UP_TO_FOUR]).cases[:2] == ("profile 1 at 1x4", "profile 2 min 1x4")


ALL_TYPES = """bool uint8 int16 uint64 float16 float64 complex64 bfloat16 float8_e4m3fn float8_e4m3fnuz float8_e5m2
float4_e2m1fn int4 uint4 int2""".split()


@pytest.mark.parametrize("dtype", ALL_TYPES)
def test_every_element_type_goes_in_and_out(dtype: str) -> None:
    def same(feed: Feed) -> Feed:
        assert feed["x"].dtype.name == dtype
        return {"y": feed["x"]}

    def other(feed: Feed) -> Feed:
        return {"y": feed["x"][::-1].copy()}

    inputs = [{"x": np.array([1, 0, 0]).astype(numpy_dtype(dtype))}] * 2
    interface = Interface(
        inputs=(InputSpec(name="x", dtype=dtype, dims=(3,)),), outputs=(TensorSpec(name="y", dtype=dtype, dims=(3,)),)
    )
    assert compare(subject(same, interface), subject(same, interface), criteria=default_criteria(), inputs=inputs).met
    assert not compare(subject(other, interface), subject(same, interface), criteria=default_criteria(), inputs=inputs).met


def test_strings_of_any_length_go_in_and_out(tmp_path: Path) -> None:
    file = tmp_path / "words.onnx"
    text = '<ir_version: 10, opset_import: ["" : 21]> words (string[N] x) => (string[N] y) { y = Identity (x) }'
    onnx.save(onnx.parser.parse_model(text), file)
    inputs = [{"x": np.array(["a", "naïve"])}, {"x": np.array(["something longer", ""])}]
    assert compare(onnx_candidate(file), onnx_candidate(file), criteria=default_criteria(), inputs=inputs).met


def test_the_contract_of_the_inputs_is_what_either_model_knows_of_them() -> None:
    plain = Interface(
        inputs=(InputSpec(name="x", dtype="float32", dims=("n", 4)),),
        outputs=(TensorSpec(name="y", dtype="float32", dims=("n", 4)),),
    )
    knowing = msgspec.structs.replace(
        VALUES,
        inputs=(InputSpec(name="x", dtype="float16", dims=("batch", "width"), low=5, high=6),),
        task="classifier",
        max_sizes={"batch": 3, "width": 9},
    )
    _, _, contract = match_interfaces(subject(double, plain), subject(double, knowing))
    assert contract.inputs == (InputSpec(name="x", dtype="float32", dims=("batch", 4), low=5, high=6),)
    assert contract.outputs == VALUES.outputs
    assert (contract.batch, contract.task) == ("batch", "classifier")
    _, _, contract = match_interfaces(subject(double), subject(double, knowing))
    assert contract.inputs == VALUES.inputs
    assert (contract.task, contract.max_sizes) == ("classifier", {"batch": 3})
    _, _, contract = match_interfaces(subject(double), subject(double, plain))
    assert contract == VALUES
    seen: list[Feed] = []

    def remembers(feed: Feed) -> Feed:
        seen.append(feed)
        return double(feed)

    assert (
        compare(subject(remembers, plain), subject(double, knowing), criteria=default_criteria()).cases[-1]
        == "max 3x4, mixed rows"
    )
    assert all(feed["x"].min() >= 5 and feed["x"].max() <= 6 for feed in seen)


def test_models_of_other_inputs_are_refused() -> None:
    with pytest.raises(ShapeError, match="`double` takes the inputs `x`, `embed` `ids`, `mask`"):
        compare(subject(double), subject(embed, TOKENS), criteria=default_criteria())
    with pytest.raises(UsageError, match="neither `double` nor `double` says what its inputs are"):
        compare(subject(double, None), subject(double, None), criteria=default_criteria())


def test_what_fails_inside_a_subject_comes_out_as_it_is() -> None:
    def refuses(feed: Feed) -> Feed:
        raise ShapeError("`x` is 1x4")

    with pytest.raises(ShapeError, match="`x` is 1x4"):
        run(refuses)


def test_polygraphy_says_nothing_and_its_logger_is_left_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    from polygraphy import config
    from polygraphy.logger import G_LOGGER

    threshold = config.ARRAY_SWAP_THRESHOLD_MB
    with G_LOGGER.verbosity(G_LOGGER.EXTRA_VERBOSE):
        before = G_LOGGER.module_severity.trie
        run(double)
        assert G_LOGGER.module_severity.trie == before

        def refuses(feed: Feed) -> Feed:
            raise ShapeError("no")

        with pytest.raises(ShapeError):
            run(refuses)
        assert G_LOGGER.module_severity.trie == before
    assert threshold == config.ARRAY_SWAP_THRESHOLD_MB
    assert capfd.readouterr() == ("", "")


def test_graphs_are_compared_without_importing_torch(tmp_path: Path) -> None:
    file = tmp_path / "twice.onnx"
    text = '<ir_version: 10, opset_import: ["" : 21]> twice (float[N] x) => (float[N] y) { y = Add (x, x) }'
    onnx.save(onnx.parser.parse_model(text), file)
    program = f"""
import sys
from ryzen_compile.numerics.criteria import defaults
from ryzen_compile.numerics.comparison import compare
from ryzen_compile.numerics.candidate_lookup import find_one
assert compare(find_one({str(file)!r}), find_one({str(file)!r}), criteria=defaults()).met
print([name for name in ("torch", "tensorrt", "tensorrt_rtx") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_subjects_are_let_go_even_when_one_of_them_fails() -> None:
    log: list[str] = []

    @contextmanager
    def opened() -> Iterator[Callable[[Any], Any]]:
        log.append("open")
        try:
            yield lambda feed: {"y": feed["missing"]}
        finally:
            log.append("closed")

    broken = Candidate(name="broken", description="broken", interface=VALUES, open=opened)
    with pytest.raises(KeyError):
        compare(broken, subject(double), criteria=default_criteria(), profiles=[UP_TO_FOUR])
    assert log == ["open", "closed"]


def test_only_one_case_is_held_at_a_time() -> None:
    made: list[weakref.ref[np.ndarray[Any, Any]]] = []
    alive: list[int] = []

    def watched(feed: Feed) -> Feed:
        y = feed["x"] * 2
        made.append(weakref.ref(y))
        alive.append(sum(one() is not None for one in made))
        return {"y": y}

    compare(subject(watched), subject(double), criteria=default_criteria(), profiles=[UP_TO_FOUR] * 5)
    assert len(alive) == 25
    assert max(alive) <= 2


def test_the_record_survives_json_and_the_report_tells_all() -> None:
    found = run(double, inputs=[{"x": np.ones((3, 4), np.float32)}])
    assert msgspec.json.decode(msgspec.json.encode(found), type=Comparison) == found
    text = report.format_comparison(found)
    assert "double, in numpy\n  against double, in numpy\n" in text
    assert "the defaults of ryzen-compile, fp32: max_abs 0.0001, max_abs_per_magnitude 1e-05, relative_l2 0.0001" in text
    assert text.endswith("MET: double against double")

    def wrong(feed: Feed) -> Feed:
        return {"y": -feed["x"]}

    text = report.format_comparison(run(wrong))
    assert "NOT MET" in text.splitlines()[-1]
    assert "FAULT" not in text
    first = found.accuracy.metrics[0]
    rows = tuple(msgspec.structs.replace(first, output=f"y{at}") for at in range(33))
    many = msgspec.structs.replace(found.accuracy, metrics=rows)
    assert "and 3 further measures, all met" in report.format_comparison(msgspec.structs.replace(found, accuracy=many))
    assert any(line.split()[1:6] == ["cosine", "-1", ">=", "0.99999", "NOT"] for line in text.splitlines())


@pytest.mark.parametrize("fill", [-1e9, float(np.finfo(np.float32).min)])
@pytest.mark.parametrize("apart", [0.0, 1e-6])
def test_random_values_beside_the_fill_of_a_mask_do_not_meet_the_criteria(fill: float, apart: float) -> None:
    def masked(seed: int, fill: float) -> Callable[[Feed], Feed]:
        def fills(feed: Feed) -> Feed:
            y = np.random.default_rng(seed).standard_normal((*feed["x"].shape[:1], 128, 8)).astype(np.float32)
            y[..., -1] = fill
            return {"y": y}

        return fills

    inputs = [{"x": np.ones((4, 4), np.float32)}]
    found = run(masked(1, fill * (1 - apart)), masked(2, fill), inputs=inputs)
    assert not found.met
    assert {name: metric(found, name).met for name in ("max_abs", "relative_l2", "cosine")} == {
        "max_abs": False,
        "relative_l2": False,
        "cosine": False,
    }
    assert any("512 x enormous values" in note for note in found.accuracy.notes)
    found = run(masked(1, fill), masked(1, fill), inputs=inputs)
    assert (found.met, found.accuracy.faults) == (True, ())


def test_an_output_of_nothing_but_fill_was_not_compared() -> None:
    def fills(feed: Feed) -> Feed:
        return {"y": np.full_like(feed["x"], np.finfo(np.float32).min)}

    found = run(fills, fills)
    assert not found.met
    assert "nothing of it was compared" in found.accuracy.faults[0]


@pytest.mark.parametrize("value", [1e300, 1.7e308])
def test_numbers_that_overflow_a_measure_fail_and_the_record_survives_json(value: float) -> None:
    def large(feed: Feed) -> Feed:
        return {"y": np.full((1, 4), value)}

    def opposite(feed: Feed) -> Feed:
        return {"y": np.full((1, 4), -value)}

    only_cosine = Criteria(name="mine", tolerances=dict.fromkeys(("fp32", "fp16", "bf16"), Tolerances(cosine=0.9)))  # type: ignore[arg-type]
    for criteria in (default_criteria(), only_cosine):
        found = run(opposite, large, criteria=criteria, inputs=[{"x": np.ones((1, 4), np.float32)}])
        assert not found.met
        assert (metric(found, "cosine").worst, metric(found, "cosine").met) == (-1.0, False)
        assert all(np.isfinite(one.worst) for one in found.accuracy.metrics)
        assert msgspec.json.decode(msgspec.json.encode(found), type=Comparison) == found
        assert any("overflows float64" in fault for fault in found.accuracy.faults) == (value > 1e308)


def test_a_difference_that_is_not_finite_fails_even_without_a_limit() -> None:
    def tiny(feed: Feed) -> Feed:
        return {"y": np.full((1, 4), 1e-300)}

    def large(feed: Feed) -> Feed:
        return {"y": np.full((1, 4), 1e300)}

    lax = Criteria(name="lax", tolerances=dict.fromkeys(("fp32", "fp16", "bf16"), Tolerances(cosine=0.9)))  # type: ignore[arg-type]
    found = run(large, tiny, criteria=lax, inputs=[{"x": np.ones((1, 4), np.float32)}])
    assert not found.met
    assert metric(found, "cosine").met
    assert "relative_l2 overflows float64" in found.accuracy.faults[0]
    assert msgspec.json.decode(msgspec.json.encode(found), type=Comparison) == found
