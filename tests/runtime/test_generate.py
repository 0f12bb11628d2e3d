"""Generation: the tokens equal those of the reference decoder for any division into chunks, any batch and any consumer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.examples import examples
from support.tiny_decoder import CAPACITY, MAX_BATCH, MAX_STEP_TOKENS, VOCABULARY, reference_logits, write

import ryzen_compile as rc
from ryzen_compile.errors import RyzenError, ShapeError, UsageError
from ryzen_compile.runtime.generation.generate import GeneratedSequence
from ryzen_compile.runtime.generation.sampling import Sampler, SamplingParams
from ryzen_compile.runtime.load import Engine

LENGTHS = (9, 1, 25, 14, 3, 31, 7)
PROMPTS = [np.random.default_rng(index).integers(0, VOCABULARY, length) for index, length in enumerate(LENGTHS)]


def expected(prompt: np.ndarray, count: int, sampling: SamplingParams | None = None, seed: int = 0) -> list[int]:
    """Return `count` reference tokens that continue a prompt, each sampled from the logits of the whole sequence."""
    sampler = Sampler(sampling or SamplingParams(), 1)
    sampler.start_sequence(0, prompt, seed)
    ids = prompt.tolist()
    for _ in range(count):
        ids.append(int(sampler.next_tokens([0], reference_logits(ids)[-1:])[0]))
    return list(ids[len(prompt) :])


def tokens_of(sequences: list[GeneratedSequence]) -> list[list[int]]:
    return [sequence.tokens.tolist() for sequence in sequences]


@pytest.mark.parametrize("chunk", [1, 5, 128])
def test_greedy_decoding_equals_the_reference(decoder: Engine, chunk: int) -> None:
    for prompt in PROMPTS[:3]:
        (sequence,) = decoder.generate(prompt, max_new_tokens=8, chunk=chunk)
        assert (sequence.tokens.dtype, sequence.finish_reason) == (np.int64, "length")
        assert sequence.tokens.tolist() == expected(prompt, 8)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.9},
        {"temperature": 1.5, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 0.7, "repetition_penalty": 1.4},
        {"repetition_penalty": 3.0},
    ],
)
def test_sampling_equals_the_reference(decoder: Engine, sampling: dict[str, Any]) -> None:
    prompts, count = PROMPTS[:3], 12
    sequences = decoder.generate(prompts, max_new_tokens=count, seed=40, **sampling)
    assert tokens_of(sequences) == [
        expected(prompt, count, SamplingParams(**sampling), 40 + index) for index, prompt in enumerate(prompts)
    ]


@settings(max_examples=examples(20))
@given(st.lists(st.integers(0, len(PROMPTS) - 1), min_size=1, max_size=MAX_BATCH), st.integers(1, 15), st.booleans())
def test_the_tokens_of_a_sequence_do_not_depend_on_the_batch(
    decoder: Engine, indices: list[int], chunk: int, greedy: bool
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.0 if greedy else 1.0}
    prompts = [PROMPTS[index] for index in indices]
    batched = decoder.generate(prompts, seed=3, chunk=chunk, **options)
    separate = [decoder.generate(prompt, seed=3 + index, **options)[0] for index, prompt in enumerate(prompts)]
    assert tokens_of(batched) == tokens_of(separate)
    assert [sequence.finish_reason for sequence in batched] == [sequence.finish_reason for sequence in separate]


def test_more_sequences_than_the_batch_are_queued(decoder: Engine, maskless: Engine) -> None:
    assert len(PROMPTS) > MAX_BATCH
    greedy = [expected(prompt, 7) for prompt in PROMPTS]
    assert tokens_of(decoder.generate(PROMPTS, max_new_tokens=7)) == greedy
    assert tokens_of(maskless.generate(PROMPTS, max_new_tokens=7, chunk=5)) == greedy
    sampling = SamplingParams(temperature=1.1, repetition_penalty=1.2)
    sampled = [expected(prompt, 7, sampling, 20 + index) for index, prompt in enumerate(PROMPTS)]
    options = {"max_new_tokens": 7, "temperature": 1.1, "repetition_penalty": 1.2, "seed": 20}
    assert tokens_of(decoder.generate(PROMPTS, **options)) == sampled


def test_the_seed_determines_the_samples(decoder: Engine) -> None:
    def sample(seed: int) -> list[list[int]]:
        return tokens_of(decoder.generate(PROMPTS[:2], max_new_tokens=10, temperature=1.2, seed=seed))

    assert sample(5) == sample(5)
    assert sample(5) != sample(6)
    (first, second) = decoder.generate([PROMPTS[0], PROMPTS[0]], max_new_tokens=10, temperature=1.2)
    assert first.tokens.tolist() != second.tokens.tolist()


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 9}, {"stop": [27, 42]}])
def test_a_stream_yields_the_generated_tokens(decoder: Engine, options: dict[str, Any]) -> None:
    streamed: list[list[int]] = [[] for _ in PROMPTS]
    order = []
    for index, token in decoder.stream(PROMPTS, max_new_tokens=9, chunk=4, **options):
        streamed[index].append(token)
        order.append(index)
    assert streamed == tokens_of(decoder.generate(PROMPTS, max_new_tokens=9, chunk=4, **options))
    assert order[0] == 1, "the shortest prompt yields the first token"
    assert set(order[:4]) < set(range(MAX_BATCH))


def test_a_stream_may_be_closed_early(decoder: Engine) -> None:
    stream = decoder.stream(PROMPTS, max_new_tokens=9, chunk=4)
    assert next(stream) == (1, expected(PROMPTS[1], 1)[0])
    stream.close()  # type: ignore[attr-defined]
    assert list(stream) == []


def test_stream_validates_immediately_and_runs_lazily(decoder: Engine) -> None:
    with pytest.raises(ShapeError, match="sequence 1 contains no ids"):
        decoder.stream([[1], []], max_new_tokens=1)
    decoder.stream([1], max_new_tokens=1)


def test_a_stop_id_ends_its_sequence_and_is_its_last_token(decoder: Engine) -> None:
    full = [expected(prompt, 9) for prompt in PROMPTS[:4]]
    stop = full[0][4]
    sequences = decoder.generate(PROMPTS[:4], max_new_tokens=9, stop=(stop, VOCABULARY + 5))
    for sequence, tokens in zip(sequences, full, strict=True):
        length = tokens.index(stop) + 1 if stop in tokens else 9
        assert sequence.tokens.tolist() == tokens[:length]
        assert sequence.finish_reason == ("stop" if stop in tokens else "length")
    assert sequences[0].finish_reason == "stop"
    assert {sequence.finish_reason for sequence in sequences} == {"stop", "length"}


def test_a_sequence_ends_when_its_states_are_full(decoder: Engine, no_slack: Engine) -> None:
    for engine in (decoder, no_slack):
        sequences = engine.generate(PROMPTS, max_new_tokens=12, chunk=8)
        for sequence, prompt in zip(sequences, PROMPTS, strict=True):
            remaining = CAPACITY - len(prompt) + 1
            assert sequence.finish_reason == ("capacity" if remaining < 12 else "length")
            assert sequence.tokens.tolist() == expected(prompt, min(remaining, 12))
        assert {sequence.finish_reason for sequence in sequences} == {"capacity", "length"}


def test_a_prompt_may_fill_the_states(decoder: Engine) -> None:
    prompt = np.resize(PROMPTS[2], CAPACITY)
    (sequence,) = decoder.generate(prompt, max_new_tokens=5)
    assert (sequence.tokens.tolist(), sequence.finish_reason) == (expected(prompt, 1), "capacity")


@pytest.mark.parametrize(
    ("low", "high"),
    [(["ids:2x4"], ["ids:2x8"]), (["ids:1x1", "ids:1x1"], ["ids:1x12", "ids:4x1"]), (["ids:3x5"], ["ids:3x5"])],
)
def test_batches_and_step_widths_follow_the_profiles(low: list[str], high: list[str], tmp_path: Path) -> None:
    package = rc.build(write(tmp_path / "m.onnx"), gpu="cpu", compare=False, cache=False, min_shapes=low, max_shapes=high)
    reference = [expected(prompt, 5) for prompt in PROMPTS]
    with rc.load(package.path) as engine:
        assert tokens_of(engine.generate(PROMPTS, max_new_tokens=5)) == reference
        for prompt, tokens in zip(PROMPTS[:2], reference, strict=False):
            assert tokens_of(engine.generate(prompt, max_new_tokens=5)) == [tokens]


def test_a_batch_of_several_sequences_requires_a_mask(tmp_path: Path) -> None:
    source = write(tmp_path / "m.onnx", mask=False)
    package = rc.build(source, gpu="cpu", compare=False, cache=False, min_shapes=["ids:2x1"], max_shapes=["ids:2x8"])
    with (
        rc.load(package.path) as engine,
        pytest.raises(ShapeError, match="requires a batch of at least 2 sequences, but has no mask input"),
    ):
        engine.generate(PROMPTS, max_new_tokens=5)


class RecordingSession:
    """A wrapper of the session of an engine that checks the shapes of each step and records its token counts."""

    def __init__(self, engine: Engine) -> None:
        self.session = engine._step_graphs[0].session
        self.token_counts: list[np.ndarray] = []

    def bind_states(self, states: Any, shapes: Any, **options: Any) -> Any:
        binding, token_counts = self.session.bind_states(states, shapes, **options), self.token_counts

        class RecordingBinding:
            def run(self, inputs: Any) -> Any:
                token_counts.append(inputs["mask"].sum(axis=1))
                assert inputs["mask"].shape == inputs["ids"].shape
                assert inputs["ids"].shape[1] == max(token_counts[-1])
                return binding.run(inputs)

            def __getattr__(self, name: str) -> Any:
                return getattr(binding, name)

        return RecordingBinding()


def test_prompts_are_divided_into_chunks_the_last_of_which_is_complete_and_steps_have_minimal_width(
    decoder: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = RecordingSession(decoder)
    monkeypatch.setattr(decoder, "_step_graphs", (dataclasses.replace(decoder._step_graphs[0], session=recorder),))  # type: ignore[arg-type]
    decoder.generate([PROMPTS[0], PROMPTS[3]], max_new_tokens=2, chunk=6)
    assert [counts.tolist() for counts in recorder.token_counts] == [[3, 2], [6, 6], [1, 6], [0, 1]]
    recorder.token_counts.clear()
    decoder.generate(PROMPTS[2], max_new_tokens=1, chunk=128)
    assert [counts.tolist() for counts in recorder.token_counts] == [[1], [MAX_STEP_TOKENS], [MAX_STEP_TOKENS]]


@pytest.mark.parametrize(
    "ids",
    [
        PROMPTS[0],
        PROMPTS[0].tolist(),
        tuple(PROMPTS[0].tolist()),
        [PROMPTS[0].tolist()],
        PROMPTS[0][None],
        PROMPTS[0].astype("u1"),
    ],
)
def test_ids_may_be_one_sequence_or_several(decoder: Engine, ids: Any) -> None:
    assert tokens_of(decoder.generate(ids, max_new_tokens=3)) == [expected(PROMPTS[0], 3)]


def test_ids_may_be_torch_tensors(decoder: Engine) -> None:
    torch = pytest.importorskip("torch")
    reference = [expected(PROMPTS[0], 3), expected(PROMPTS[4], 3)]
    assert tokens_of(decoder.generate([torch.tensor(PROMPTS[index]) for index in (0, 4)], max_new_tokens=3)) == reference
    assert tokens_of(decoder.generate(torch.tensor(PROMPTS[0])[None], max_new_tokens=3)) == reference[:1]


@pytest.mark.parametrize(
    ("ids", "options", "error_type", "message"),
    [
        ([], {}, ShapeError, "there is no sequence to continue"),
        (np.zeros((0,), int), {}, ShapeError, "sequence 0 contains no ids"),
        ([[1], []], {}, ShapeError, "sequence 1 contains no ids"),
        ([[1], [[2]]], {}, ShapeError, "sequence 1 contains no ids"),
        ([[1], [0.5]], {}, ShapeError, "sequence 1 is float64, expected integers"),
        ("abc", {}, UsageError, "this model has no tokenizer, so it takes ids and not text"),
        ([[1], [[1], [1, 2]]], {}, ShapeError, "sequence 1 cannot be read as ids"),
        ([[1], [61]], {}, ShapeError, r"sequence 1: ids must be in 0\.\.60 \(got 61\.\.61\)"),
        (
            [[1], [1] * (CAPACITY + 1)],
            {},
            ShapeError,
            f"sequence 1 contains 41 ids, but the capacity of the decoder is {CAPACITY} tokens",
        ),
        ([1], {"max_new_tokens": 0}, UsageError, r"`max_new_tokens` must be at least 1 \(got 0\)"),
        ([1], {"chunk": 0}, UsageError, r"`chunk` must be at least 1 \(got 0\)"),
        ([1], {"seed": -1}, UsageError, r"`seed` must be at least 0 \(got -1\)"),
        ([1], {"top_p": 0.0}, UsageError, r"`top_p` must be above 0 and at most 1 \(got 0\.0\)"),
    ],
)
def test_invalid_requests_are_rejected_before_anything_runs(
    decoder: Engine,
    monkeypatch: pytest.MonkeyPatch,
    ids: Any,
    options: dict[str, Any],
    error_type: type[RyzenError],
    message: str,
) -> None:
    monkeypatch.setattr(decoder, "_step_graphs", ())
    for method in (decoder.generate, decoder.stream):
        with pytest.raises(error_type, match=message):
            method(ids, **{"max_new_tokens": 1, **options})
