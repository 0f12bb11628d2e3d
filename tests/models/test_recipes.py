"""Recipes: samples, sensitivity of the models to their inputs, and export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ryzen_compile import registry
from ryzen_compile.data.sources import from_recipe
from ryzen_compile.data.synthetic import synthesize
from ryzen_compile.exporter import export
from ryzen_compile.spec.profile import derive_profile
from ryzen_compile.torch_module import load_module, make_run_function

NAMES = ("llama", "minilm", "resnet", "tinylm", "vit-b")


def test_all_recipes_are_registered() -> None:
    assert tuple(registry.names("recipes")) == NAMES
    assert tuple(registry.find_recipe(name).name for name in NAMES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_samples_match_the_interface_and_are_deterministic(name: str) -> None:
    recipe = registry.find_recipe(name)
    first, again, other = (list(from_recipe(recipe, seed=seed)) for seed in (0, 0, 1))
    leading = recipe.interface.inputs[0].name
    assert len(first) >= 4
    assert all(np.array_equal(a[key], b[key]) for a, b in zip(first, again, strict=True) for key in a)
    assert not np.array_equal(first[0][leading], other[0][leading])


@pytest.mark.parametrize("name", NAMES)
def test_the_first_sample_has_a_batch_above_one_and_another_has_batch_one(name: str) -> None:
    recipe = registry.find_recipe(name)
    leading = recipe.interface.inputs[0].name
    sizes = [sample[leading].shape[0] for sample in from_recipe(recipe, seed=0)]
    assert sizes[0] > 1, "torch.export treats a size of 1 as a constant"
    assert 1 in sizes


@pytest.mark.parametrize("name", NAMES)
def test_inputs_can_be_synthesized_for_the_derived_profile(name: str) -> None:
    recipe = registry.find_recipe(name)
    for _, shapes in derive_profile(recipe.interface).corners():
        inputs = synthesize(recipe.interface, shapes, seed=0, rows="mixed")
        assert {name: array.shape for name, array in inputs.items()} == shapes


def test_minilm_embeds_sentences_of_the_same_meaning_closely() -> None:
    from ryzen_models.minilm import RECIPE, embed, tokenize

    inputs = tokenize(["A man is eating food.", "Someone is having a meal.", "The stock market fell sharply today."])
    vectors = make_run_function(load_module(RECIPE).module, RECIPE.interface)(inputs)["last_hidden_state"]
    similar, dissimilar = (
        embed(vectors, inputs["attention_mask"])[0] @ other for other in embed(vectors, inputs["attention_mask"])[1:]
    )
    assert similar > 0.6
    assert dissimilar < 0.2


def test_minilm_padding_does_not_change_the_token_vectors() -> None:
    from ryzen_models.minilm import RECIPE, tokenize

    run = make_run_function(load_module(RECIPE).module, RECIPE.interface)
    unpadded, padded = (
        run(tokenize(sentences))["last_hidden_state"][0, :3] for sentences in (["Yes."], ["Yes.", "A man is eating food."])
    )
    assert np.abs(unpadded - padded).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet", "vit-b"])
def test_classifiers_separate_the_image_classes_with_a_margin(name: str) -> None:
    from ryzen_models._images import KINDS, make_images

    recipe = registry.find_recipe(name)
    run = make_run_function(load_module(recipe).module, recipe.interface)
    logits = run({"pixel_values": make_images(range(KINDS), seed=7)})["logits"]
    ordered = np.sort(logits)
    assert logits.argmax(1).tolist() == list(range(KINDS))
    assert (ordered[:, -1] - ordered[:, -2]).min() > 0.5


@pytest.mark.slow
def test_batch_norms_of_resnet_have_computed_statistics() -> None:
    import torch

    from ryzen_models.resnet import RECIPE

    norms = [module for module in RECIPE.make_module().modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert len(norms) == 53
    assert all(norm.running_mean.std() > 0.01 and norm.running_var.std() > 0.01 for norm in norms)


def test_llama_outputs_depend_on_the_context_and_the_cache() -> None:
    recipe = registry.find_recipe("llama")
    run = make_run_function(load_module(recipe).module, recipe.interface)
    inputs = dict(next(iter(from_recipe(recipe, seed=0))))
    logits = run(inputs)["logits"]
    assert len(set(logits.argmax(-1).ravel().tolist())) > 8
    ids = inputs["input_ids"].copy()
    ids[:, 0] = (ids[:, 0] + 1) % 4096
    assert (run({**inputs, "input_ids": ids})["logits"][:, -1].argmax(-1) != logits[:, -1].argmax(-1)).any()
    other = {name: array * -1 if name.startswith("past") else array for name, array in inputs.items()}
    assert np.abs(run(other)["logits"] - logits).max() > 0.1


def test_llama_in_two_steps_matches_one_step() -> None:
    recipe = registry.find_recipe("llama")
    run = make_run_function(load_module(recipe).module, recipe.interface)

    def shapes(seq: int) -> dict[str, tuple[int, ...]]:
        state, mask = (2, 2, 0, 64), (2, seq)
        return {s.name: state if s.role == "state" else mask for s in recipe.interface.inputs}

    whole = synthesize(recipe.interface, shapes(6), seed=0, rows="identical")
    first = synthesize(recipe.interface, shapes(4), seed=0, rows="identical")
    first["input_ids"] = whole["input_ids"][:, :4]
    outputs = run(first)
    second = {
        "input_ids": whole["input_ids"][:, 4:],
        "attention_mask": whole["attention_mask"],
        "position_ids": whole["position_ids"][:, 4:],
        **{state.input: outputs[state.output] for state in recipe.interface.states},
    }
    assert np.abs(run(second)["logits"] - run(whole)["logits"][:, 4:]).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.exhaustive] if name == "vit-b" else []) for name in NAMES]
)
def test_every_recipe_exports_within_its_tolerance(name: str, tmp_path: Path) -> None:
    report = export(name, tmp_path / f"{name}.onnx")
    recipe = registry.find_recipe(name)
    assert report.strategy == "torch.export"
    assert report.inputs == tuple(map(str, recipe.interface.inputs))
    assert all(deviation.bound == recipe.max_abs for deviation in report.deviations)
