"""A session's steps are what the decoder computes at once, however they are cut, beside whatever, in whatever memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import onnx
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import tiny_models
from support.tiny_decoder import (
    CAPACITY,
    HEAD_SIZE,
    HEADS,
    MAX_BATCH,
    MAX_STEP_TOKENS,
    VOCABULARY,
    interface,
    reference_logits,
    write,
)

import ryzen_compile as rc
from ryzen_compile import registry
from ryzen_compile.backends.onnxruntime.state_binding import OnnxRuntimeStateBinding, _DeviceBuffer, _InitialState
from ryzen_compile.errors import BackendError, RyzenError, ShapeError, UsageError
from ryzen_compile.runtime.generation.decoder_spec import make_decoder_spec
from ryzen_compile.runtime.generation.session import DecodeSession
from ryzen_compile.runtime.generation.step_graphs import StepGraph
from ryzen_compile.runtime.load import Engine
from ryzen_compile.spec import profile
from ryzen_compile.spec.interface import Interface, StateSpec

SEQUENCES = np.random.default_rng(3).integers(0, VOCABULARY, (MAX_BATCH, CAPACITY))
WHOLE = np.stack([reference_logits(row.tolist()) for row in SEQUENCES])
"""The logits of SEQUENCES, (sequences, tokens, vocabulary)."""


def feed(session: DecodeSession, counts: list[int], width: int = 0, *, padding: int = 0) -> list[np.ndarray]:
    """Feed the next tokens of SEQUENCES to each row and return the logits of those."""
    width = max(width, *counts, 1)
    ids, mask = np.full((len(counts), width), padding), np.zeros((len(counts), width), np.int64)
    for row, (count, start) in enumerate(zip(counts, session.lengths, strict=True)):
        ids[row, :count], mask[row, :count] = SEQUENCES[row, start : start + count], 1
    logits = session.step(ids, mask)
    return [logits[row, :count] for row, count in enumerate(counts)]


def check(session: DecodeSession, counts: list[int], width: int = 0) -> None:
    """Feed the next tokens and hold their logits to WHOLE."""
    starts = session.lengths
    for row, logits in enumerate(feed(session, counts, width)):
        np.testing.assert_allclose(logits, WHOLE[row, starts[row] : starts[row] + counts[row]], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(session.lengths, starts + counts)


@st.composite
def chunkings(draw: st.DrawFn) -> list[list[int]]:
    """How many tokens each of some rows gets at each step."""
    batch = draw(st.integers(1, MAX_BATCH))
    room, steps = [CAPACITY] * batch, []
    for _ in range(draw(st.integers(1, 6))):
        counts = [draw(st.integers(0, min(MAX_STEP_TOKENS, left))) for left in room]
        room = [left - count for left, count in zip(room, counts, strict=True)]
        steps.append(counts)
    return steps


@given(chunkings())
def test_steps_of_any_lengths_give_the_logits_of_the_whole(decoder: Engine, steps: list[list[int]]) -> None:
    with decoder.session(len(steps[0])) as session:
        for counts in steps:
            check(session, counts)


@given(chunkings(), st.integers(0, VOCABULARY - 1))
def test_padding_leaves_no_trace(decoder: Engine, steps: list[list[int]], padding: int) -> None:
    with decoder.session(len(steps[0])) as session, decoder.session(len(steps[0])) as other:
        for counts in steps:
            for one, two in zip(
                feed(session, counts, MAX_STEP_TOKENS), feed(other, counts, MAX_STEP_TOKENS, padding=padding), strict=True
            ):
                np.testing.assert_array_equal(one, two)


def test_without_a_mask_every_token_counts(decoder: Engine, maskless: Engine) -> None:
    for engine in (decoder, maskless):
        with engine.session(2) as session:
            for start, end in ((0, 5), (5, 6), (6, 17)):
                np.testing.assert_allclose(session.step(SEQUENCES[:2, start:end]), WHOLE[:2, start:end], rtol=0, atol=1e-4)
            assert session.lengths.tolist() == [17, 17]


def test_ids_may_be_lists_and_arrays_of_any_integers(decoder: Engine) -> None:
    torch = pytest.importorskip("torch")
    ids = SEQUENCES[:1, :4]
    mask = np.ones((1, 4), bool)
    for given_ids, given_mask in ((ids.tolist(), [[1, 1, 1, 1]]), (ids.astype(np.uint8), mask), (torch.tensor(ids), None)):
        with decoder.session() as session:
            np.testing.assert_allclose(session.step(given_ids, given_mask), WHOLE[:1, :4], rtol=0, atol=1e-4)


def test_a_row_may_stay_behind_even_when_it_is_full(decoder: Engine) -> None:
    with decoder.session(2) as session:
        for counts in ([12, 0], [12, 0], [12, 1], [4, 0]):
            check(session, counts)
        before = session.read_state("key.0")[0]
        for counts in ([0, 11], [0, 1], [0, 0]):
            check(session, counts, width=MAX_STEP_TOKENS)
        np.testing.assert_array_equal(session.read_state("key.0")[0, :, :CAPACITY], before[:, :CAPACITY])
        assert session.lengths.tolist() == [CAPACITY, 13]


def test_rows_that_are_reset_begin_anew_and_the_others_go_on(decoder: Engine) -> None:
    with decoder.session(3) as session:
        check(session, [5, 7, 2])
        session.reset([1])
        assert session.lengths.tolist() == [5, 0, 2]
        assert session.read_state("seen").tolist() == [5, 0, 2]
        assert not session.read_state("value.1")[1].any()
        check(session, [3, 4, 1])
        session.reset()
        assert not session.read_state("key.0").any()
        check(session, [1, 2, 3])


def test_a_state_is_read_as_a_copy_of_its_type(decoder: Engine) -> None:
    with decoder.session(2) as session:
        check(session, [3, 4])
        state = session.read_state("key.1")
        assert (state.shape, state.dtype) == ((2, HEADS, CAPACITY + MAX_STEP_TOKENS, HEAD_SIZE), np.float32)
        state[:] = 7
        assert session.read_state("seen").tolist() == [3, 4]
        check(session, [1, 1])
        with pytest.raises(UsageError, match="no state `key.2`") as caught:
            session.read_state("key.2")
        assert caught.value.hint == "did you mean `key.1`?"


def steps_of(session: DecodeSession) -> OnnxRuntimeStateBinding:
    assert isinstance(session._first_binding, OnnxRuntimeStateBinding)
    return session._first_binding


def addresses(session: DecodeSession, name: str) -> tuple[int, int]:
    held = steps_of(session)._state_buffers.buffers[name]
    return held.read_buffer.ort_value.data_ptr(), held.write_buffer.ort_value.data_ptr()


def test_caches_are_written_in_place(decoder: Engine) -> None:
    with decoder.session(2) as session:
        there = addresses(session, "key.0")
        assert there[0] == there[1]
        for count in (3, 1, 1):
            check(session, [count, count])
            assert addresses(session, "key.0") == there
            outputs = dict(
                zip(steps_of(session)._state_buffers.buffers, steps_of(session)._binding.get_outputs(), strict=False)
            )
            assert outputs["key.0"].data_ptr() == there[0]
        written = np.abs(session.read_state("key.0")[0]).max(axis=(0, 2)) > 0
        assert written.tolist() == [True] * 5 + [False] * (CAPACITY + MAX_STEP_TOKENS - 5)


def test_other_states_swap_between_two_memories_and_compute_the_same(decoder: Engine, swapping: Engine) -> None:
    with decoder.session(2) as session, swapping.session(2) as other:
        first = addresses(other, "value.1")
        assert len({*first, *addresses(other, "seen")}) == 4
        for at, counts in enumerate(([4, 2], [1, 0], [3, 3], [1, 1]), 1):
            for one, two in zip(feed(session, counts), feed(other, counts), strict=True):
                np.testing.assert_array_equal(one, two)
            assert addresses(other, "value.1") == (first if at % 2 == 0 else first[::-1])
            np.testing.assert_array_equal(session.read_state("value.1"), other.read_state("value.1"))
        other.reset([0])
        session.reset([0])
        for one, two in zip(feed(session, [2, 2]), feed(other, [2, 2]), strict=True):
            np.testing.assert_array_equal(one, two)


def test_logits_are_not_written_over_by_the_next_step(decoder: Engine) -> None:
    with decoder.session(2) as session:
        logits = [session.step(SEQUENCES[:2, at : at + 1]) for at in range(5)]
    np.testing.assert_allclose(np.concatenate(logits, axis=1), WHOLE[:2, :5], rtol=0, atol=1e-4)


@pytest.mark.parametrize("cache", ["float16", "bfloat16"])
def test_caches_may_be_of_a_half_type(cache: str, tmp_path: Path) -> None:
    told = interface(cache=cache)
    with registry.find_backend("onnxruntime").open(str(write(tmp_path / "half.onnx", cache=cache))) as running:
        with DecodeSession(
            StepGraph(session=running, interface=told, profiles=(profile.derive_profile(told),)), batch=2
        ) as session:
            logits = [feed(session, [5, 3])[0], feed(session, [1, 4])[0]]
            np.testing.assert_allclose(np.concatenate(logits), WHOLE[0, :6], rtol=0, atol=0.3)
            key = session.read_state("key.1")
            assert key.dtype.name == cache
            assert np.abs(key[0, :, :6].astype(np.float32)).min(axis=(0, 2)).all()
            session.reset([0])
            assert not session.read_state("key.1")[0].any()
            assert session.read_state("key.1")[1].any()


def test_outputs_whose_shapes_depend_on_data_are_returned(tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (int64[B,S] ids, int64[B] seen) => (int64[2,N] places, int64[B] next) {
      places = NonZero (ids)  axis = Constant <value_ints = [1]> ()  sum = ReduceSum <keepdims = 0> (ids, axis)
      next = Add (seen, sum) }
    """
    onnx.save(onnx.parser.parse_model(text), tmp_path / "g.onnx")
    state = StateSpec(name="seen", input="seen", output="next", initial_value=-1, in_place=True)
    with registry.find_backend("onnxruntime").open(str(tmp_path / "g.onnx")) as running:
        steps = running.bind_states([state], {"seen": (1,)})
        for ids, places in (([[1, 0, 1]], [[0, 0], [0, 2]]), ([[0, 0, 1]], [[0], [2]]), ([[1, 1]], [[0, 0], [0, 1]])):
            assert steps.run({"ids": np.array(ids)})["places"].tolist() == places
        assert steps.read("seen").tolist() == [-1 + 5]
        steps.reset([0])
        assert steps.read("seen").tolist() == [-1]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int64])
def test_memory_that_is_not_the_hosts_is_filled_written_by_rows_and_read(dtype: Any) -> None:
    memory = _DeviceBuffer(_InitialState(shape=(3, 2), dtype=np.dtype(dtype), fill_value=-1), device="cpu")
    assert memory.read().tolist() == [[-1, -1]] * 3
    memory.write([0, 2], 5)
    assert (memory.read().dtype, memory.read().tolist()) == (dtype, [[5, 5], [-1, -1], [5, 5]])


@pytest.mark.parametrize(
    ("ids", "mask", "says"),
    [
        ([[1, 2]], None, "`ids` is 1x2, a step takes 2xN ids"),
        ([1, 2], None, "`ids` is 2, a step takes 2xN ids"),
        (np.zeros((2, 0), int), None, "`ids` is 2x0, a step takes 2xN ids, N at least 1"),
        ([[1.0], [2.0]], None, "`ids` is float64, it takes integers"),
        ([[1], [2, 3]], None, "`ids` cannot be read as an array"),
        ([[1], [61]], None, r"ids lie in 0\.\.60, got 1\.\.61"),
        ([[-1], [3]], None, r"ids lie in 0\.\.60, got -1\.\.3"),
        ([[1, 2], [3, 4]], [[1, 1]], "the mask is 1x2, and `ids` 2x2"),
        ([[1, 2], [3, 4]], [[1, 1], [0, 1]], "must be ones and then zeros"),
        ([[1, 2], [3, 4]], [[1, 2], [1, 1]], "must be ones and then zeros"),
        (np.zeros((2, MAX_STEP_TOKENS + 1), int), None, f"`ids` is 2x{MAX_STEP_TOKENS + 1}: axis 1 takes 1..{MAX_STEP_TOKENS}"),
    ],
)
def test_a_step_that_does_not_fit_is_refused_and_changes_nothing(decoder: Engine, ids: Any, mask: Any, says: str) -> None:
    with decoder.session(2) as session:
        check(session, [3, 2])
        with pytest.raises(ShapeError, match=says):
            session.step(ids, mask)
        check(session, [2, 1])


def test_a_mask_is_refused_where_none_is_taken(maskless: Engine) -> None:
    with maskless.session() as session, pytest.raises(ShapeError, match="takes no mask"):
        session.step([[1, 2]], [[1, 0]])


@pytest.mark.parametrize("batch", [0, MAX_BATCH + 1])
def test_a_batch_outside_of_the_profiles_is_refused(decoder: Engine, batch: int) -> None:
    with pytest.raises(ShapeError, match=f"axis 0 takes 1..{MAX_BATCH}, got {batch}"):
        decoder.session(batch)


def test_a_step_beyond_the_capacity_is_refused_and_changes_nothing(decoder: Engine) -> None:
    with decoder.session(2) as session:
        for counts in ([12, 1], [12, 1], [12, 1]):
            check(session, counts)
        before = {state.name: session.read_state(state.name) for state in session.decoder.states}
        with pytest.raises(ShapeError, match=f"row 0 has seen 36 tokens, with 5 more it has over {CAPACITY}"):
            session.step(SEQUENCES[:2, :5])
        assert session.lengths.tolist() == [36, 3]
        for name, array in before.items():
            np.testing.assert_array_equal(session.read_state(name), array)
        check(session, [4, 5])


def test_without_a_capacity_there_is_no_bound(tmp_path: Path) -> None:
    told = interface(capacity=None)
    with registry.find_backend("onnxruntime").open(str(write(tmp_path / "m.onnx", capacity=None))) as running:
        with DecodeSession(StepGraph(session=running, interface=told, profiles=(profile.derive_profile(told),))) as session:
            for _ in range(CAPACITY + 3):
                session.step([[1]])
            assert session.lengths.tolist() == [CAPACITY + 3]


def test_after_a_step_that_failed_every_row_must_be_reset(tight: Engine) -> None:
    with tight.session(2) as session:
        for counts in ([12, 1], [12, 1], [12, 1]):
            check(session, counts)
        with pytest.raises(BackendError, match="failed on `.*`: Non-zero status code .* TensorScatter"):
            feed(session, [1, 1], width=MAX_STEP_TOKENS)
        for rows in ([], [0]):
            session.reset(rows)
            with pytest.raises(RyzenError, match="a step failed") as caught:
                session.step([[1], [1]])
            assert caught.value.hint == "reset() every row"
        session.reset()
        check(session, [5, 3])


@pytest.mark.parametrize("rows", [[-1], [2], [0, 5]])
def test_rows_that_are_not_there_cannot_be_reset(decoder: Engine, rows: list[int]) -> None:
    with decoder.session(2) as session:
        check(session, [1, 1])
        with pytest.raises(UsageError, match="this session has no row"):
            session.reset(rows)
        assert session.lengths.tolist() == [1, 1]


def changed(told: Interface, **changes: Any) -> Interface:
    return msgspec.structs.replace(told, **changes)


def undecoders() -> Iterator[tuple[Interface, str]]:
    told = interface()
    ids, mask, seen, *caches = told.inputs
    seen_state, key, *others = told.states
    more = msgspec.structs.replace(mask, name="positions", role="positions")
    growing = msgspec.structs.replace(key, append_axis=2)
    unknown = msgspec.structs.replace(caches[0], dims=("batch", HEADS, "slots", HEAD_SIZE))
    wide = msgspec.structs.replace(mask, dims=("batch", "past+seq"))
    yield changed(told, states=(), inputs=(ids, mask)), "it has no states"
    yield changed(told, states=(seen_state, growing, *others)), "the state `key.0` grows at each step"
    yield changed(told, inputs=(ids, mask, seen, unknown, *caches[1:])), "`?past.key.0.* has no fixed shape"
    yield changed(told, inputs=(ids, mask, msgspec.structs.replace(seen, dims=()), *caches)), "seen.* has no fixed shape"
    yield changed(told, inputs=(mask, seen, *caches)), "it has 0 inputs of ids"
    yield changed(told, inputs=(ids, wide, seen, *caches)), "its mask mask: .* is not over the tokens of a step"
    yield changed(told, inputs=(ids, mask, more, seen, *caches)), "`positions` is neither ids, a mask nor a state"
    yield changed(told, outputs=told.outputs[1:]), "no logits"


@pytest.mark.parametrize(("told", "says"), list(undecoders()))
def test_what_keeps_an_engine_from_being_a_decoder_is_named(told: Interface, says: str) -> None:
    with pytest.raises(RyzenError, match=says) as caught:
        make_decoder_spec(told)
    assert "kv-static" in str(caught.value.hint)


def test_a_model_that_is_no_decoder_has_no_session(tmp_path: Path) -> None:
    package = rc.build(tiny_models.write(tmp_path / "small.onnx"), gpu="cpu", compare=False, cache=False)
    with rc.load(package.path) as engine:
        with pytest.raises(RyzenError, match="no decoder of fixed-size states: it has no states"):
            engine.session()
        with pytest.raises(RyzenError, match="no decoder of fixed-size states"):
            engine.generate([1], max_new_tokens=1)


def test_a_closed_session_and_a_closed_engine_say_so(decoder: Engine, tmp_path: Path) -> None:
    session = decoder.session()
    session.close()
    session.close()
    for use in (lambda: session.step([[1]]), lambda: session.reset(), lambda: session.read_state("seen")):
        with pytest.raises(RyzenError, match="this session is closed"):
            use()
    package = rc.build(write(tmp_path / "tiny.onnx"), gpu="cpu", compare=False, cache=False)
    engine = rc.load(package.path)
    with engine.session() as open_still:
        engine.close()
        with pytest.raises(BackendError, match="is closed"):
            open_still.step([[1]])
    with pytest.raises(RyzenError, match="this engine is closed"):
        engine.session()


def test_sessions_of_one_engine_run_in_several_threads(decoder: Engine) -> None:
    wrong: list[BaseException] = []

    def work(batch: int) -> None:
        try:
            with decoder.session(batch) as session:
                for at in range(20):
                    check(session, [1 + (at + row) % 2 for row in range(batch)])
        except AssertionError as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(batch,)) for batch in (1, 2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@contextmanager
def no_growth(most: int) -> Iterator[None]:
    process = psutil.Process()
    before = process.memory_info().rss
    yield
    assert process.memory_info().rss - before < most


@pytest.mark.parametrize("name", ["decoder", "swapping"])
def test_two_thousand_steps_take_no_memory(name: str, request: pytest.FixtureRequest) -> None:
    engine: Engine = request.getfixturevalue(name)
    with engine.session(MAX_BATCH) as session:

        def steps(count: int) -> None:
            for at in range(count):
                if session.lengths.max() > CAPACITY - MAX_STEP_TOKENS:
                    session.reset([at % MAX_BATCH, int(session.lengths.argmax())])
                session.step(SEQUENCES[:, : 1 + at % MAX_STEP_TOKENS if at % 5 == 0 else 1])

        steps(300)
        with no_growth(2 * 2**20):
            steps(2000)


def test_interfaces_written_before_states_could_be_in_place_are_read() -> None:
    told = msgspec.to_builtins(interface())
    del told["capacity"]
    for state in told["states"]:
        del state["in_place"]
    read = msgspec.json.decode(msgspec.json.encode(told), type=Interface)
    assert read.capacity is None
    assert not any(state.in_place for state in read.states)
