"""Sampling is what transformers does with the same logits, and a sequence draws the same whatever is beside it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers.generation import logits_process

from ryzen_compile.errors import RyzenError, UsageError
from ryzen_compile.runtime.generation.sampling import (
    Sampler,
    SamplingParams,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    probabilities,
    sample_tokens,
    softmax,
)

NO_IDS = torch.zeros((1, 0), dtype=torch.long)
SEEDS = st.integers(0, 2**32 - 1)


def some_logits(seed: int, rows: int = 3, vocabulary: int = 50) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, vocabulary)) * rng.uniform(0.5, 6, (rows, 1))


def by(warper: logits_process.LogitsProcessor, logits: np.ndarray) -> np.ndarray:
    found: np.ndarray = warper(NO_IDS, torch.from_numpy(logits)).numpy()
    return found


@given(SEEDS, st.integers(1, 60))
def test_top_k_is_that_of_transformers(seed: int, k: int) -> None:
    for logits in (some_logits(seed), some_logits(seed).round()):
        np.testing.assert_array_equal(keep_top_k(logits, k), by(logits_process.TopKLogitsWarper(k), logits))


@given(SEEDS, st.floats(0.01, 0.99))
@example(seed=0, p=1e-17)
def test_top_p_is_that_of_transformers(seed: int, p: float) -> None:
    logits = some_logits(seed)
    np.testing.assert_array_equal(keep_top_p(logits, p), by(logits_process.TopPLogitsWarper(p), logits))


@given(SEEDS, st.floats(0.0, 1.0))
def test_min_p_is_that_of_transformers(seed: int, p: float) -> None:
    logits = some_logits(seed)
    np.testing.assert_array_equal(keep_min_p(logits, p), by(logits_process.MinPLogitsWarper(p), logits))


@given(SEEDS, st.floats(0.2, 3.0))
def test_the_penalty_of_repetition_is_that_of_transformers(seed: int, penalty: float) -> None:
    logits = some_logits(seed)
    ids = np.random.default_rng(seed).integers(0, logits.shape[1], (len(logits), 7))
    held = np.zeros(logits.shape, bool)
    np.put_along_axis(held, ids, True, axis=1)
    wanted = logits_process.RepetitionPenaltyLogitsProcessor(penalty)(torch.from_numpy(ids), torch.from_numpy(logits))
    np.testing.assert_array_equal(penalize_repetition(logits, held, penalty), wanted.numpy())


@given(SEEDS, st.floats(0.2, 3.0), st.integers(1, 50), st.floats(0.05, 0.99), st.floats(0.0, 0.5))
def test_they_apply_in_the_order_of_transformers(seed: int, temperature: float, k: int, p: float, least: float) -> None:
    logits = some_logits(seed)
    warpers = logits_process.LogitsProcessorList(
        [
            logits_process.TemperatureLogitsWarper(temperature),
            logits_process.TopKLogitsWarper(k),
            logits_process.TopPLogitsWarper(p),
            logits_process.MinPLogitsWarper(least),
        ]
    )
    wanted = warpers(NO_IDS, torch.from_numpy(logits)).softmax(-1).numpy()
    found = probabilities(logits, SamplingParams(temperature=temperature, top_k=k, top_p=p, min_p=least))
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-15)
    np.testing.assert_array_equal(found > 0, wanted > 0)


@pytest.mark.parametrize("temperature", [1e-310, 1e-5, 1e300])
def test_the_extremes_of_temperature_are_the_likeliest_and_any(temperature: float) -> None:
    found = probabilities(some_logits(0), SamplingParams(temperature=temperature))
    if temperature < 1:
        np.testing.assert_array_equal(found.argmax(-1), some_logits(0).argmax(-1))
        np.testing.assert_allclose(found.max(-1), 1, rtol=0, atol=1e-6)
    else:
        np.testing.assert_allclose(found, 1 / 50, rtol=0, atol=1e-12)


@given(SEEDS)
def test_a_token_is_drawn_as_often_as_it_is_likely(seed: int) -> None:
    count = 20_000
    likely = softmax(keep_top_k(some_logits(seed, rows=1), 9))
    tokens = sample_tokens(np.broadcast_to(likely, (count, 50)), (np.arange(count) + 0.5) / count)
    np.testing.assert_allclose(np.bincount(tokens, minlength=50) / count, likely[0], rtol=0, atol=1.5 / count)


@pytest.mark.parametrize("uniform", [0.0, 0.5, np.nextafter(1, 0)])
def test_what_cannot_be_is_never_drawn(uniform: float) -> None:
    for seed in range(200):
        likely = softmax(keep_top_k(some_logits(seed), 3))
        tokens = sample_tokens(likely, np.full(3, uniform))
        assert (np.take_along_axis(likely, tokens[:, None], axis=1) > 0).all()


def drawn(sampling: SamplingParams, slots: list[int], rounds: int = 30) -> dict[int, list[int]]:
    """Draw for the sequences 0, 1 and 2 as far as they are in `slots`."""
    sampler = Sampler(sampling, 3)
    for slot in slots:
        sampler.start_sequence(slot, np.array([slot, 5]), seed=100 + slot)
    found: dict[int, list[int]] = {slot: [] for slot in slots}
    for at in range(rounds):
        for slot, token in zip(slots, sampler.next_tokens(slots, some_logits(at)[slots]), strict=True):
            found[slot].append(int(token))
    return found


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_what_a_sequence_draws_does_not_depend_on_what_is_beside_it(temperature: float, penalty: float) -> None:
    sampling = SamplingParams(temperature=temperature, top_p=0.9, repetition_penalty=penalty)
    together = drawn(sampling, [0, 1, 2])
    assert together == drawn(sampling, [2, 0, 1])
    for slot in range(3):
        assert drawn(sampling, [slot])[slot] == together[slot]
    if temperature:
        assert len({tuple(tokens) for tokens in together.values()}) == 3


def test_greedy_is_the_likeliest_after_the_penalty() -> None:
    logits = np.array([[3.0, 2.5, -1.0]], np.float16)
    sampler = Sampler(SamplingParams(repetition_penalty=1.5, top_k=1), 1)
    sampler.start_sequence(0, np.array([7, 2]), seed=0)
    assert [int(sampler.next_tokens([0], logits)[0]) for _ in range(3)] == [0, 1, 0]
    sampler.start_sequence(0, np.array([0]), seed=0)
    assert sampler.next_tokens([0], logits)[0] == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_refused(bad: float) -> None:
    logits = some_logits(0)
    logits[1, 3] = bad
    with pytest.raises(RyzenError, match="NaN or infinite"):
        Sampler(SamplingParams(), 3).next_tokens([0, 1, 2], logits)


def test_a_token_that_the_graph_rules_out_is_not_chosen() -> None:
    logits = np.full((1, 4), -np.inf)
    logits[0, 2] = -3.0
    sampler = Sampler(SamplingParams(temperature=1.0, repetition_penalty=1.2), 1)
    sampler.start_sequence(0, np.array([1]), seed=0)
    assert sampler.next_tokens([0], logits)[0] == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
    ],
)
def test_what_is_out_of_range_is_named(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"`{name}` is {value}"):
        SamplingParams(**{name: value})  # type: ignore[arg-type]
