"""MiniLM with its real weights on real sentences: the accuracy against PyTorch that the project guarantees."""

from __future__ import annotations

from pathlib import Path

import pytest

from ryzen_compile import registry
from ryzen_compile.exporter import export
from ryzen_compile.ir.load import load
from ryzen_compile.ir.save import save
from ryzen_compile.numerics.candidate_lookup import find_candidate
from ryzen_compile.numerics.comparison import Comparison, compare
from ryzen_compile.numerics.criteria import default_criteria
from ryzen_compile.numerics.grid import CaseSource
from ryzen_compile.pipeline import parser, pass_manager
from ryzen_compile.pipeline.range_measurement import measure_ranges
from ryzen_compile.spec.dtypes import Precision
from ryzen_compile.spec.passes import PassContext
from ryzen_compile.spec.profile import Profile, Shape

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("minilm") / "minilm.onnx"
    export("minilm", path)
    return path


def make_profile(*sizes: Shape) -> Profile:
    low, opt, high = ({"input_ids": size, "attention_mask": size} for size in sizes)
    return Profile(min=low, opt=opt, max=high)


def worst_values(comparison: Comparison) -> dict[str, float]:
    return {metric.name: metric.worst for metric in comparison.accuracy.metrics}


def test_in_fp32_no_element_differs_by_1e_4_from_batch_1_to_8_and_length_1_to_256(minilm: Path) -> None:
    result = compare(
        find_candidate(str(minilm)),
        find_candidate("recipe:minilm"),
        criteria=default_criteria(),
        case_source=CaseSource(profiles=[make_profile((1, 1), (4, 64), (8, 256))]),
    )
    assert result.met
    assert result.accuracy.cases == 5
    assert worst_values(result)["max_abs"] < 1e-4
    assert worst_values(result)["batch_invariance_max_abs"] < 1e-4


@pytest.mark.parametrize(("precision", "min_cosine"), [("fp16", 0.9999), ("bf16", 0.999)])
def test_in_half_precision_every_token_vector_has_a_cosine_near_1(
    minilm: Path, tmp_path: Path, precision: Precision, min_cosine: float
) -> None:
    model = load(minilm)
    recipe = registry.find_recipe("minilm")
    context = PassContext(
        backend="tensorrt-rtx", interface=recipe.interface, samples=list(recipe.samples(0)), measure_ranges=measure_ranges
    )
    pass_manager.run_passes(model, parser.parse(f"fold,precision{{to={precision}}}"), context, registry.properties())
    half = tmp_path / f"minilm.{precision}.onnx"
    save(model, half)
    result = compare(
        find_candidate(str(half)),
        find_candidate("recipe:minilm"),
        criteria=default_criteria(),
        case_source=CaseSource(profiles=[make_profile((1, 3), (2, 32), (4, 64))]),
    )
    assert result.precision == precision
    assert result.met
    assert min_cosine < worst_values(result)["cosine"] < 1.0
