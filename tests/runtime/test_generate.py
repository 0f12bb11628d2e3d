"""What is generated is what the decoder says token by token, however prompts are cut, batched and read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_decoder import CAPACITY, MAX_BATCH, MAX_STEP_TOKENS, VOCABULARY, reference_logits, write

import ryzen_compile as rc
from ryzen_compile.errors import RyzenError, ShapeError, UsageError
from ryzen_compile.runtime.generation.generate import GeneratedSequence
from ryzen_compile.runtime.generation.sampling import Sampler, SamplingParams
from ryzen_compile.runtime.load import Engine

LENGTHS = (9, 1, 25, 14, 3, 31, 7)
PROMPTS = [np.random.default_rng(at).integers(0, VOCABULARY, length) for at, length in enumerate(LENGTHS)]


def expected(prompt: np.ndarray, count: int, sampling: SamplingParams | None = None, seed: int = 0) -> list[int]:
    """Continue a prompt by `count` tokens, each chosen from the logits of the whole so far."""
    sampler = Sampler(sampling or SamplingParams(), 1)
    sampler.start_sequence(0, prompt, seed)
    ids = prompt.tolist()
    for _ in range(count):
        ids.append(int(sampler.next_tokens([0], reference_logits(ids)[-1:])[0]))
    return list(ids[len(prompt) :])


def tokens_of(found: list[GeneratedSequence]) -> list[list[int]]:
    return [one.tokens.tolist() for one in found]


@pytest.mark.parametrize("chunk", [1, 5, 128])
def test_a_sequence_goes_on_greedily(decoder: Engine, chunk: int) -> None:
    for prompt in PROMPTS[:3]:
        (found,) = decoder.generate(prompt, max_new_tokens=8, chunk=chunk)
        assert (found.tokens.dtype, found.finish_reason) == (np.int64, "length")
        assert found.tokens.tolist() == expected(prompt, 8)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.9},
        {"temperature": 1.5, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 0.7, "repetition_penalty": 1.4},
        {"repetition_penalty": 3.0},
    ],
)
def test_a_sequence_goes_on_by_sampling(decoder: Engine, sampling: dict[str, Any]) -> None:
    prompts, count = PROMPTS[:3], 12
    found = decoder.generate(prompts, max_new_tokens=count, seed=40, **sampling)
    assert tokens_of(found) == [expected(one, count, SamplingParams(**sampling), 40 + at) for at, one in enumerate(prompts)]


@settings(max_examples=40)
@given(st.lists(st.integers(0, len(PROMPTS) - 1), min_size=1, max_size=MAX_BATCH), st.integers(1, 15), st.booleans())
def test_sequences_together_are_each_alone(decoder: Engine, chosen: list[int], chunk: int, greedy: bool) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.0 if greedy else 1.0}
    prompts = [PROMPTS[at] for at in chosen]
    together = decoder.generate(prompts, seed=3, chunk=chunk, **options)
    alone = [decoder.generate(prompt, seed=3 + at, **options)[0] for at, prompt in enumerate(prompts)]
    assert tokens_of(together) == tokens_of(alone)
    assert [one.finish_reason for one in together] == [one.finish_reason for one in alone]


def test_more_sequences_than_a_session_holds_take_turns(decoder: Engine, maskless: Engine) -> None:
    assert len(PROMPTS) > MAX_BATCH
    wanted = [expected(prompt, 7) for prompt in PROMPTS]
    assert tokens_of(decoder.generate(PROMPTS, max_new_tokens=7)) == wanted
    assert tokens_of(maskless.generate(PROMPTS, max_new_tokens=7, chunk=5)) == wanted
    hot = SamplingParams(temperature=1.1, repetition_penalty=1.2)
    drawn = [expected(prompt, 7, hot, 20 + at) for at, prompt in enumerate(PROMPTS)]
    options = {"max_new_tokens": 7, "temperature": 1.1, "repetition_penalty": 1.2, "seed": 20}
    assert tokens_of(decoder.generate(PROMPTS, **options)) == drawn


def test_a_seed_decides_what_is_drawn(decoder: Engine) -> None:
    def draw(seed: int) -> list[list[int]]:
        return tokens_of(decoder.generate(PROMPTS[:2], max_new_tokens=10, temperature=1.2, seed=seed))

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)
    (one, two) = decoder.generate([PROMPTS[0], PROMPTS[0]], max_new_tokens=10, temperature=1.2)
    assert one.tokens.tolist() != two.tokens.tolist()


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 9}, {"stop": [27, 42]}])
def test_a_stream_is_what_is_generated_as_it_comes(decoder: Engine, options: dict[str, Any]) -> None:
    streamed: list[list[int]] = [[] for _ in PROMPTS]
    order = []
    for index, token in decoder.stream(PROMPTS, max_new_tokens=9, chunk=4, **options):
        streamed[index].append(token)
        order.append(index)
    assert streamed == tokens_of(decoder.generate(PROMPTS, max_new_tokens=9, chunk=4, **options))
    assert order[0] == 1, "the shortest prompt is the first that goes on"
    assert set(order[:4]) < set(range(MAX_BATCH))


def test_a_stream_may_be_left(decoder: Engine) -> None:
    stream = decoder.stream(PROMPTS, max_new_tokens=9, chunk=4)
    assert next(stream) == (1, expected(PROMPTS[1], 1)[0])
    stream.close()  # type: ignore[attr-defined]
    assert list(stream) == []


def test_nothing_runs_before_a_stream_is_read(decoder: Engine) -> None:
    with pytest.raises(ShapeError, match="sequence 1 holds no ids"):
        decoder.stream([[1], []], max_new_tokens=1)
    decoder.stream([1], max_new_tokens=1)


def test_a_stop_id_ends_its_sequence_and_is_its_last(decoder: Engine) -> None:
    wanted = [expected(prompt, 9) for prompt in PROMPTS[:4]]
    stop = wanted[0][4]
    found = decoder.generate(PROMPTS[:4], max_new_tokens=9, stop=(stop, VOCABULARY + 5))
    for one, whole in zip(found, wanted, strict=True):
        ends = whole.index(stop) + 1 if stop in whole else 9
        assert one.tokens.tolist() == whole[:ends]
        assert one.finish_reason == ("stop" if stop in whole else "length")
    assert found[0].finish_reason == "stop"
    assert {one.finish_reason for one in found} == {"stop", "length"}


def test_a_sequence_ends_where_its_states_are_full(decoder: Engine, tight: Engine) -> None:
    for engine in (decoder, tight):
        found = engine.generate(PROMPTS, max_new_tokens=12, chunk=8)
        for one, prompt in zip(found, PROMPTS, strict=True):
            room = CAPACITY - len(prompt) + 1
            assert one.finish_reason == ("capacity" if room < 12 else "length")
            assert one.tokens.tolist() == expected(prompt, min(room, 12))
        assert {one.finish_reason for one in found} == {"capacity", "length"}


def test_a_prompt_may_fill_the_states(decoder: Engine) -> None:
    prompt = np.resize(PROMPTS[2], CAPACITY)
    (found,) = decoder.generate(prompt, max_new_tokens=5)
    assert (found.tokens.tolist(), found.finish_reason) == (expected(prompt, 1), "capacity")


@pytest.mark.parametrize(
    ("low", "high"),
    [(["ids:2x4"], ["ids:2x8"]), (["ids:1x1", "ids:1x1"], ["ids:1x12", "ids:4x1"]), (["ids:3x5"], ["ids:3x5"])],
)
def test_batches_and_steps_are_those_of_the_profiles(low: list[str], high: list[str], tmp_path: Path) -> None:
    package = rc.build(write(tmp_path / "m.onnx"), gpu="cpu", compare=False, cache=False, min_shapes=low, max_shapes=high)
    wanted = [expected(prompt, 5) for prompt in PROMPTS]
    with rc.load(package.path) as engine:
        assert tokens_of(engine.generate(PROMPTS, max_new_tokens=5)) == wanted
        for prompt, tokens in zip(PROMPTS[:2], wanted, strict=False):
            assert tokens_of(engine.generate(prompt, max_new_tokens=5)) == [tokens]


def test_several_sequences_at_once_need_a_mask(tmp_path: Path) -> None:
    source = write(tmp_path / "m.onnx", mask=False)
    package = rc.build(source, gpu="cpu", compare=False, cache=False, min_shapes=["ids:2x1"], max_shapes=["ids:2x8"])
    with rc.load(package.path) as engine, pytest.raises(ShapeError, match="several sequences at once, and no mask"):
        engine.generate(PROMPTS, max_new_tokens=5)


class Watches:
    """Stands before the session of an engine and keeps the shapes and the masks that its steps feed."""

    def __init__(self, engine: Engine) -> None:
        self.inner = engine._step_graphs[0].session
        self.fed: list[np.ndarray] = []

    def bind_states(self, states: Any, shapes: Any, **beside: Any) -> Any:
        steps, fed = self.inner.bind_states(states, shapes, **beside), self.fed

        class Steps:
            def run(self, feed: Any) -> Any:
                fed.append(feed["mask"].sum(axis=1))
                assert feed["mask"].shape == feed["ids"].shape
                assert feed["ids"].shape[1] == max(fed[-1])
                return steps.run(feed)

            def __getattr__(self, name: str) -> Any:
                return getattr(steps, name)

        return Steps()


def test_prompts_are_fed_in_chunks_the_last_whole_and_no_step_holds_more_than_it_needs(
    decoder: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watches(decoder)
    monkeypatch.setattr(decoder, "_step_graphs", (dataclasses.replace(decoder._step_graphs[0], session=watched),))  # type: ignore[arg-type]
    decoder.generate([PROMPTS[0], PROMPTS[3]], max_new_tokens=2, chunk=6)
    assert [counts.tolist() for counts in watched.fed] == [[3, 2], [6, 6], [1, 6], [0, 1]]
    watched.fed.clear()
    decoder.generate(PROMPTS[2], max_new_tokens=1, chunk=128)
    assert [counts.tolist() for counts in watched.fed] == [[1], [MAX_STEP_TOKENS], [MAX_STEP_TOKENS]]


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
def test_ids_are_one_sequence_or_several(decoder: Engine, ids: Any) -> None:
    assert tokens_of(decoder.generate(ids, max_new_tokens=3)) == [expected(PROMPTS[0], 3)]


def test_ids_may_be_torch_tensors(decoder: Engine) -> None:
    torch = pytest.importorskip("torch")
    wanted = [expected(PROMPTS[0], 3), expected(PROMPTS[4], 3)]
    assert tokens_of(decoder.generate([torch.tensor(PROMPTS[at]) for at in (0, 4)], max_new_tokens=3)) == wanted
    assert tokens_of(decoder.generate(torch.tensor(PROMPTS[0])[None], max_new_tokens=3)) == wanted[:1]


@pytest.mark.parametrize(
    ("ids", "options", "kind", "says"),
    [
        ([], {}, ShapeError, "there is no sequence to continue"),
        (np.zeros((0,), int), {}, ShapeError, "sequence 0 holds no ids"),
        ([[1], []], {}, ShapeError, "sequence 1 holds no ids"),
        ([[1], [[2]]], {}, ShapeError, "sequence 1 holds no ids"),
        ([[1], [0.5]], {}, ShapeError, "sequence 1 is float64, ids are integers"),
        ("abc", {}, ShapeError, "sequence 0 holds no ids"),
        ([[1], [[1], [1, 2]]], {}, ShapeError, "sequence 1 cannot be read as ids"),
        ([[1], [61]], {}, ShapeError, r"sequence 1: ids lie in 0\.\.60, got 61\.\.61"),
        ([[1], [1] * (CAPACITY + 1)], {}, ShapeError, f"sequence 1 holds 41 ids, the decoder takes {CAPACITY} tokens"),
        ([1], {"max_new_tokens": 0}, UsageError, "`max_new_tokens` is 0"),
        ([1], {"chunk": 0}, UsageError, "`chunk` is 0"),
        ([1], {"seed": -1}, UsageError, "`seed` is -1"),
        ([1], {"top_p": 0.0}, UsageError, "`top_p` is 0"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_runs(
    decoder: Engine, monkeypatch: pytest.MonkeyPatch, ids: Any, options: dict[str, Any], kind: type[RyzenError], says: str
) -> None:
    monkeypatch.setattr(decoder, "_step_graphs", ())
    for use in (decoder.generate, decoder.stream):
        with pytest.raises(kind, match=says):
            use(ids, **{"max_new_tokens": 1, **options})
