"""Recipe of a tiny decoder with random weights: documents of two lengths, and questions of which most are answerable."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from ryzen_compile.spec.interface import Interface
from ryzen_compile.spec.recipe import EvaluationData, Question, Recipe, Task
from support.decoders import VOCABULARY, module

Array = np.ndarray[Any, Any]
BUDGET = 24


def passes(step: int, score: str = "value-norm") -> str:
    """Return the pipeline that gives the decoder evicting caches; `step` is the number of tokens per step, 0: any.

    In the first layer the value vectors of equal tokens are equal, so `value-norm` breaks ties by slot, provided that all
    steps have the same size. With steps of several sizes, scores may differ by rounding, except those of `position`.
    """
    return f"kv-static{{capacity=512,step={step}}},kv-evict{{score={score},budget={BUDGET},sinks=2,recent-window=6}}"


def documents(seed: int) -> Iterator[Array]:
    """Yield three documents, of 70 or 90 tokens."""
    for index in range(3):
        yield np.random.default_rng([seed, index]).integers(0, VOCABULARY, 90 if index % 2 else 70)


@functools.cache
def question(seed: int) -> Question:
    """Return a question with a prompt of 20 or 40 tokens; in three of four the answer is the module's greedy continuation."""
    import torch

    random = np.random.default_rng([7, seed])
    prompt = random.integers(0, VOCABULARY, 40 if seed % 2 else 20)
    answer: list[int] = []
    with torch.no_grad():
        for _ in range(2):
            ids = torch.from_numpy(np.array([[*prompt, *answer]], np.int64))
            answer.append(int(module("llama")(ids).logits[0, -1].argmax()))
    if seed % 4 == 3:
        answer[1] = (answer[1] + 1) % VOCABULARY
    depth = (seed % 5) / 4
    return Question(
        prompt=prompt, answer=np.array(answer), depth=depth, distance=int((1 - depth) * len(prompt)) + 60 * (seed % 2)
    )


def recipe() -> Recipe:
    """Return the recipe; it has no interface and cannot be exported."""
    return Recipe(
        name="tiny",
        description="a tiny llama",
        make_module=lambda: module("llama"),
        interface=Interface(inputs=(), outputs=()),
        samples=lambda seed: (),
        max_abs=1e-4,
        evaluation=EvaluationData(
            documents=documents,
            tasks=(Task(name="recall", description="the greedy continuation of the module", make_question=question),),
        ),
    )


def recipe_without_evaluation() -> Recipe:
    """Return the recipe without evaluation data."""
    from dataclasses import replace

    return replace(recipe(), evaluation=None)


def recipe_without_cache() -> Recipe:
    """Return the recipe with a module that is not a language model."""
    from dataclasses import replace

    import torch

    return replace(recipe(), make_module=lambda: torch.nn.Linear(2, 2))
