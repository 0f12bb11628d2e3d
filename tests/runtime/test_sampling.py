"""Sampling: the results of Transformers for the same logits, and samples that do not depend on the batch."""

from __future__ import annotations

import re

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


def random_logits(seed: int, rows: int = 3, vocabulary: int = 50) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, vocabulary)) * rng.uniform(0.5, 6, (rows, 1))


def transformers_result(processor: logits_process.LogitsProcessor, logits: np.ndarray) -> np.ndarray:
    result: np.ndarray = processor(NO_IDS, torch.from_numpy(logits)).numpy()
    return result


@given(SEEDS, st.integers(1, 60))
def test_top_k_equals_transformers(seed: int, k: int) -> None:
    for logits in (random_logits(seed), random_logits(seed).round()):
        np.testing.assert_array_equal(keep_top_k(logits, k), transformers_result(logits_process.TopKLogitsWarper(k), logits))


@given(SEEDS, st.floats(0.01, 0.99))
@example(seed=0, p=1e-17)
def test_top_p_equals_transformers(seed: int, p: float) -> None:
    logits = random_logits(seed)
    np.testing.assert_array_equal(keep_top_p(logits, p), transformers_result(logits_process.TopPLogitsWarper(p), logits))


@given(SEEDS, st.floats(0.0, 1.0))
def test_min_p_equals_transformers(seed: int, p: float) -> None:
    logits = random_logits(seed)
    np.testing.assert_array_equal(keep_min_p(logits, p), transformers_result(logits_process.MinPLogitsWarper(p), logits))


@given(SEEDS, st.floats(0.2, 3.0))
def test_the_repetition_penalty_equals_transformers(seed: int, penalty: float) -> None:
    logits = random_logits(seed)
    ids = np.random.default_rng(seed).integers(0, logits.shape[1], (len(logits), 7))
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, ids, True, axis=1)
    expected = logits_process.RepetitionPenaltyLogitsProcessor(penalty)(torch.from_numpy(ids), torch.from_numpy(logits))
    np.testing.assert_array_equal(penalize_repetition(logits, seen, penalty), expected.numpy())


@given(SEEDS, st.floats(0.2, 3.0), st.integers(1, 50), st.floats(0.05, 0.99), st.floats(0.0, 0.5))
def test_parameters_are_applied_in_the_order_of_transformers(
    seed: int, temperature: float, k: int, p: float, min_p: float
) -> None:
    logits = random_logits(seed)
    processors = logits_process.LogitsProcessorList(
        [
            logits_process.TemperatureLogitsWarper(temperature),
            logits_process.TopKLogitsWarper(k),
            logits_process.TopPLogitsWarper(p),
            logits_process.MinPLogitsWarper(min_p),
        ]
    )
    expected = processors(NO_IDS, torch.from_numpy(logits)).softmax(-1).numpy()
    probs = probabilities(logits, SamplingParams(temperature=temperature, top_k=k, top_p=p, min_p=min_p))
    np.testing.assert_allclose(probs, expected, rtol=1e-9, atol=1e-15)
    np.testing.assert_array_equal(probs > 0, expected > 0)


@pytest.mark.parametrize("temperature", [1e-310, 1e-5, 1e300])
def test_extreme_temperatures_are_greedy_or_uniform(temperature: float) -> None:
    probs = probabilities(random_logits(0), SamplingParams(temperature=temperature))
    if temperature < 1:
        np.testing.assert_array_equal(probs.argmax(-1), random_logits(0).argmax(-1))
        np.testing.assert_allclose(probs.max(-1), 1, rtol=0, atol=1e-6)
    else:
        np.testing.assert_allclose(probs, 1 / 50, rtol=0, atol=1e-12)


@given(SEEDS)
def test_tokens_are_sampled_with_their_probabilities(seed: int) -> None:
    count = 20_000
    probs = softmax(keep_top_k(random_logits(seed, rows=1), 9))
    tokens = sample_tokens(np.broadcast_to(probs, (count, 50)), (np.arange(count) + 0.5) / count)
    np.testing.assert_allclose(np.bincount(tokens, minlength=50) / count, probs[0], rtol=0, atol=1.5 / count)


@pytest.mark.parametrize("uniform", [0.0, 0.5, np.nextafter(1, 0)])
def test_a_token_of_probability_0_is_never_sampled(uniform: float) -> None:
    for seed in range(200):
        probs = softmax(keep_top_k(random_logits(seed), 3))
        tokens = sample_tokens(probs, np.full(3, uniform))
        assert (np.take_along_axis(probs, tokens[:, None], axis=1) > 0).all()


def sample_sequences(sampling: SamplingParams, slots: list[int], steps: int = 30) -> dict[int, list[int]]:
    """Return the tokens sampled for those of the sequences 0, 1 and 2 that are in `slots`."""
    sampler = Sampler(sampling, 3)
    for slot in slots:
        sampler.start_sequence(slot, np.array([slot, 5]), seed=100 + slot)
    tokens: dict[int, list[int]] = {slot: [] for slot in slots}
    for step in range(steps):
        for slot, token in zip(slots, sampler.next_tokens(slots, random_logits(step)[slots]), strict=True):
            tokens[slot].append(int(token))
    return tokens


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_samples_of_a_sequence_do_not_depend_on_the_batch(temperature: float, penalty: float) -> None:
    sampling = SamplingParams(temperature=temperature, top_p=0.9, repetition_penalty=penalty)
    together = sample_sequences(sampling, [0, 1, 2])
    assert together == sample_sequences(sampling, [2, 0, 1])
    for slot in range(3):
        assert sample_sequences(sampling, [slot])[slot] == together[slot]
    if temperature:
        assert len({tuple(tokens) for tokens in together.values()}) == 3


def test_greedy_decoding_selects_the_most_likely_token_after_the_penalty() -> None:
    logits = np.array([[3.0, 2.5, -1.0]], np.float16)
    sampler = Sampler(SamplingParams(repetition_penalty=1.5, top_k=1), 1)
    sampler.start_sequence(0, np.array([7, 2]), seed=0)
    assert [int(sampler.next_tokens([0], logits)[0]) for _ in range(3)] == [0, 1, 0]
    sampler.start_sequence(0, np.array([0]), seed=0)
    assert sampler.next_tokens([0], logits)[0] == 1


@pytest.mark.parametrize("invalid", [np.nan, np.inf])
def test_nan_and_infinite_logits_are_rejected(invalid: float) -> None:
    logits = random_logits(0)
    logits[1, 3] = invalid
    with pytest.raises(RyzenError, match="NaN or infinite"):
        Sampler(SamplingParams(), 3).next_tokens([0, 1, 2], logits)


def test_a_token_with_logit_minus_infinity_is_not_sampled() -> None:
    logits = np.full((1, 4), -np.inf)
    logits[0, 2] = -3.0
    sampler = Sampler(SamplingParams(temperature=1.0, repetition_penalty=1.2), 1)
    sampler.start_sequence(0, np.array([1]), seed=0)
    assert sampler.next_tokens([0], logits)[0] == 2


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("temperature", -0.1, "at least 0"),
        ("temperature", float("nan"), "at least 0"),
        ("top_k", -1, "at least 0"),
        ("top_p", 0.0, "above 0 and at most 1"),
        ("top_p", 1.1, "above 0 and at most 1"),
        ("min_p", -0.1, "in 0..1"),
        ("repetition_penalty", 0.0, "above 0"),
    ],
)
def test_a_value_out_of_range_is_rejected_by_name(name: str, value: float, expected: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"`{name}` must be {expected} (got {value})")):
        SamplingParams(**{name: value})  # type: ignore[arg-type]
