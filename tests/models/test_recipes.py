"""Recipes: their samples mean something, their nets tell inputs apart, and they export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ryzen_compile import registry
from ryzen_compile.data.sources import from_recipe
from ryzen_compile.data.synthetic import synthesize
from ryzen_compile.exporter import export
from ryzen_compile.spec.profile import derive_profile
from ryzen_compile.torch_module import load_module, make_runner

NAMES = ("llama", "minilm", "resnet", "tinylm", "vit-b")


def test_every_recipe_is_found_by_name() -> None:
    assert tuple(registry.names("recipes")) == NAMES
    assert tuple(registry.find_recipe(name).name for name in NAMES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_samples_fit_the_interface_and_follow_from_the_seed(name: str) -> None:
    recipe = registry.find_recipe(name)
    first, again, other = (list(from_recipe(recipe, seed=seed)) for seed in (0, 0, 1))
    leading = recipe.interface.inputs[0].name
    assert len(first) >= 4
    assert all(np.array_equal(one[key], two[key]) for one, two in zip(first, again, strict=True) for key in one)
    assert not np.array_equal(first[0][leading], other[0][leading])


@pytest.mark.parametrize("name", NAMES)
def test_the_first_sample_suits_the_exporter_and_some_other_is_of_batch_one(name: str) -> None:
    recipe = registry.find_recipe(name)
    leading = recipe.interface.inputs[0].name
    sizes = [sample[leading].shape[0] for sample in from_recipe(recipe, seed=0)]
    assert sizes[0] > 1, "torch takes a size of 1 for a constant"
    assert 1 in sizes


@pytest.mark.parametrize("name", NAMES)
def test_the_derived_profile_can_be_fed(name: str) -> None:
    recipe = registry.find_recipe(name)
    for _, shapes in derive_profile(recipe.interface).corners():
        feed = synthesize(recipe.interface, shapes, seed=0, rows="mixed")
        assert {name: array.shape for name, array in feed.items()} == shapes


def test_minilm_finds_the_sentences_that_mean_the_same() -> None:
    from ryzen_models.minilm import RECIPE, embed, tokenize

    feed = tokenize(["A man is eating food.", "Someone is having a meal.", "The stock market fell sharply today."])
    vectors = make_runner(load_module(RECIPE).module, RECIPE.interface)(feed)["last_hidden_state"]
    alike, unlike = (embed(vectors, feed["attention_mask"])[0] @ other for other in embed(vectors, feed["attention_mask"])[1:])
    assert alike > 0.6
    assert unlike < 0.2


def test_minilm_pads_do_not_change_what_counts() -> None:
    from ryzen_models.minilm import RECIPE, tokenize

    run = make_runner(load_module(RECIPE).module, RECIPE.interface)
    alone, padded = (run(tokenize(some))["last_hidden_state"][0, :3] for some in (["Yes."], ["Yes.", "A man is eating food."]))
    assert np.abs(alone - padded).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet", "vit-b"])
def test_classifiers_tell_the_kinds_of_pictures_apart_with_a_margin(name: str) -> None:
    from ryzen_models._images import KINDS, make_images

    recipe = registry.find_recipe(name)
    run = make_runner(load_module(recipe).module, recipe.interface)
    logits = run({"pixel_values": make_images(range(KINDS), seed=7)})["logits"]
    ordered = np.sort(logits)
    assert logits.argmax(1).tolist() == list(range(KINDS))
    assert (ordered[:, -1] - ordered[:, -2]).min() > 0.5


@pytest.mark.slow
def test_resnets_batch_norms_hold_statistics_of_their_own() -> None:
    import torch

    from ryzen_models.resnet import RECIPE

    norms = [module for module in RECIPE.make_module().modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert len(norms) == 53
    assert all(norm.running_mean.std() > 0.01 and norm.running_var.std() > 0.01 for norm in norms)


def test_llamas_words_depend_on_their_context_and_on_the_cache() -> None:
    recipe = registry.find_recipe("llama")
    run = make_runner(load_module(recipe).module, recipe.interface)
    feed = dict(next(iter(from_recipe(recipe, seed=0))))
    logits = run(feed)["logits"]
    assert len(set(logits.argmax(-1).ravel().tolist())) > 8
    ids = feed["input_ids"].copy()
    ids[:, 0] = (ids[:, 0] + 1) % 4096
    assert (run({**feed, "input_ids": ids})["logits"][:, -1].argmax(-1) != logits[:, -1].argmax(-1)).any()
    other = {name: array * -1 if name.startswith("past") else array for name, array in feed.items()}
    assert np.abs(run(other)["logits"] - logits).max() > 0.1


def test_llama_in_two_steps_says_what_it_says_in_one() -> None:
    recipe = registry.find_recipe("llama")
    run = make_runner(load_module(recipe).module, recipe.interface)

    def shapes(seq: int) -> dict[str, tuple[int, ...]]:
        state, mask = (2, 2, 0, 64), (2, seq)
        return {s.name: state if s.role == "state" else mask for s in recipe.interface.inputs}

    whole = synthesize(recipe.interface, shapes(6), seed=0, rows="identical")
    first = synthesize(recipe.interface, shapes(4), seed=0, rows="identical")
    first["input_ids"] = whole["input_ids"][:, :4]
    left = run(first)
    second = {
        "input_ids": whole["input_ids"][:, 4:],
        "attention_mask": whole["attention_mask"],
        "position_ids": whole["position_ids"][:, 4:],
        **{state.input: left[state.output] for state in recipe.interface.states},
    }
    assert np.abs(run(second)["logits"] - run(whole)["logits"][:, 4:]).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_exports_within_its_bound(name: str, tmp_path: Path) -> None:
    report = export(name, tmp_path / f"{name}.onnx")
    recipe = registry.find_recipe(name)
    assert report.strategy == "torch.export"
    assert report.inputs == tuple(map(str, recipe.interface.inputs))
    assert all(one.bound == recipe.max_abs for one in report.deviations)
