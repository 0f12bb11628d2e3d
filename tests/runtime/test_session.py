"""Decoding sessions: the logits equal those of one pass for any division into steps, any batch and any state buffers."""

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
LOGITS = np.stack([reference_logits(row.tolist()) for row in SEQUENCES])
"""The logits of SEQUENCES, (sequences, tokens, vocabulary)."""


def step(session: DecodeSession, counts: list[int], width: int = 0, *, padding: int = 0) -> list[np.ndarray]:
    """Run a step on the next `counts` tokens of each row of SEQUENCES and return their logits."""
    width = max(width, *counts, 1)
    ids, mask = np.full((len(counts), width), padding), np.zeros((len(counts), width), np.int64)
    for row, (count, start) in enumerate(zip(counts, session.lengths, strict=True)):
        ids[row, :count], mask[row, :count] = SEQUENCES[row, start : start + count], 1
    logits = session.step(ids, mask)
    return [logits[row, :count] for row, count in enumerate(counts)]


def check(session: DecodeSession, counts: list[int], width: int = 0) -> None:
    """Run a step on the next tokens and compare their logits with LOGITS."""
    starts = session.lengths
    for row, logits in enumerate(step(session, counts, width)):
        np.testing.assert_allclose(logits, LOGITS[row, starts[row] : starts[row] + counts[row]], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(session.lengths, starts + counts)


@st.composite
def chunkings(draw: st.DrawFn) -> list[list[int]]:
    """Draw the numbers of tokens of each row in each step."""
    batch = draw(st.integers(1, MAX_BATCH))
    remaining, steps = [CAPACITY] * batch, []
    for _ in range(draw(st.integers(1, 6))):
        counts = [draw(st.integers(0, min(MAX_STEP_TOKENS, rest))) for rest in remaining]
        remaining = [rest - count for rest, count in zip(remaining, counts, strict=True)]
        steps.append(counts)
    return steps


@given(chunkings())
def test_steps_of_any_lengths_return_the_logits_of_one_pass(decoder: Engine, steps: list[list[int]]) -> None:
    with decoder.session(len(steps[0])) as session:
        for counts in steps:
            check(session, counts)


@given(chunkings(), st.integers(0, VOCABULARY - 1))
def test_padding_does_not_affect_states(decoder: Engine, steps: list[list[int]], padding: int) -> None:
    with decoder.session(len(steps[0])) as session, decoder.session(len(steps[0])) as other:
        for counts in steps:
            for logits, padded in zip(
                step(session, counts, MAX_STEP_TOKENS), step(other, counts, MAX_STEP_TOKENS, padding=padding), strict=True
            ):
                np.testing.assert_array_equal(logits, padded)


def test_without_a_mask_every_token_is_valid(decoder: Engine, maskless: Engine) -> None:
    for engine in (decoder, maskless):
        with engine.session(2) as session:
            for start, end in ((0, 5), (5, 6), (6, 17)):
                np.testing.assert_allclose(session.step(SEQUENCES[:2, start:end]), LOGITS[:2, start:end], rtol=0, atol=1e-4)
            assert session.lengths.tolist() == [17, 17]


def test_ids_may_be_lists_and_arrays_of_any_integers(decoder: Engine) -> None:
    torch = pytest.importorskip("torch")
    ids = SEQUENCES[:1, :4]
    mask = np.ones((1, 4), bool)
    for given_ids, given_mask in ((ids.tolist(), [[1, 1, 1, 1]]), (ids.astype(np.uint8), mask), (torch.tensor(ids), None)):
        with decoder.session() as session:
            np.testing.assert_allclose(session.step(given_ids, given_mask), LOGITS[:1, :4], rtol=0, atol=1e-4)


def test_a_row_may_have_no_tokens_in_a_step_even_at_capacity(decoder: Engine) -> None:
    with decoder.session(2) as session:
        for counts in ([12, 0], [12, 0], [12, 1], [4, 0]):
            check(session, counts)
        before = session.read_state("key.0")[0]
        for counts in ([0, 11], [0, 1], [0, 0]):
            check(session, counts, width=MAX_STEP_TOKENS)
        np.testing.assert_array_equal(session.read_state("key.0")[0, :, :CAPACITY], before[:, :CAPACITY])
        assert session.lengths.tolist() == [CAPACITY, 13]


def test_rows_that_are_reset_start_new_sequences_and_the_others_continue(decoder: Engine) -> None:
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


def test_read_state_returns_a_copy_with_the_element_type_of_the_state(decoder: Engine) -> None:
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


def ort_binding(session: DecodeSession) -> OnnxRuntimeStateBinding:
    assert isinstance(session._first_binding, OnnxRuntimeStateBinding)
    return session._first_binding


def addresses(session: DecodeSession, name: str) -> tuple[int, int]:
    buffer = ort_binding(session)._state_buffers.buffers[name]
    return buffer.read_buffer.ort_value.data_ptr(), buffer.write_buffer.ort_value.data_ptr()


def test_caches_are_updated_in_place(decoder: Engine) -> None:
    with decoder.session(2) as session:
        initial = addresses(session, "key.0")
        assert initial[0] == initial[1]
        for count in (3, 1, 1):
            check(session, [count, count])
            assert addresses(session, "key.0") == initial
            outputs = dict(
                zip(ort_binding(session)._state_buffers.buffers, ort_binding(session)._binding.get_outputs(), strict=False)
            )
            assert outputs["key.0"].data_ptr() == initial[0]
        written = np.abs(session.read_state("key.0")[0]).max(axis=(0, 2)) > 0
        assert written.tolist() == [True] * 5 + [False] * (CAPACITY + MAX_STEP_TOKENS - 5)


def test_double_buffered_states_are_swapped_and_compute_the_same(decoder: Engine, double_buffered: Engine) -> None:
    with decoder.session(2) as session, double_buffered.session(2) as other:
        first = addresses(other, "value.1")
        assert len({*first, *addresses(other, "seen")}) == 4
        for at, counts in enumerate(([4, 2], [1, 0], [3, 3], [1, 1]), 1):
            for logits, other_logits in zip(step(session, counts), step(other, counts), strict=True):
                np.testing.assert_array_equal(logits, other_logits)
            assert addresses(other, "value.1") == (first if at % 2 == 0 else first[::-1])
            np.testing.assert_array_equal(session.read_state("value.1"), other.read_state("value.1"))
        other.reset([0])
        session.reset([0])
        for logits, other_logits in zip(step(session, [2, 2]), step(other, [2, 2]), strict=True):
            np.testing.assert_array_equal(logits, other_logits)


def test_logits_are_not_overwritten_by_the_next_step(decoder: Engine) -> None:
    with decoder.session(2) as session:
        logits = [session.step(SEQUENCES[:2, at : at + 1]) for at in range(5)]
    np.testing.assert_allclose(np.concatenate(logits, axis=1), LOGITS[:2, :5], rtol=0, atol=1e-4)


@pytest.mark.parametrize("cache", ["float16", "bfloat16"])
def test_caches_may_be_half_precision(cache: str, tmp_path: Path) -> None:
    spec = interface(cache=cache)
    with registry.find_backend("onnxruntime").open(str(write(tmp_path / "half.onnx", cache=cache))) as ort_session:
        with DecodeSession(
            StepGraph(session=ort_session, interface=spec, profiles=(profile.derive_profile(spec),)), batch=2
        ) as session:
            logits = [step(session, [5, 3])[0], step(session, [1, 4])[0]]
            np.testing.assert_allclose(np.concatenate(logits), LOGITS[0, :6], rtol=0, atol=0.3)
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
    with registry.find_backend("onnxruntime").open(str(tmp_path / "g.onnx")) as ort_session:
        binding = ort_session.bind_states([state], {"seen": (1,)})
        for ids, places in (([[1, 0, 1]], [[0, 0], [0, 2]]), ([[0, 0, 1]], [[0], [2]]), ([[1, 1]], [[0, 0], [0, 1]])):
            assert binding.run({"ids": np.array(ids)})["places"].tolist() == places
        assert binding.read("seen").tolist() == [-1 + 5]
        binding.reset([0])
        assert binding.read("seen").tolist() == [-1]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int64])
def test_a_device_buffer_is_initialized_written_by_rows_and_read(dtype: Any) -> None:
    buffer = _DeviceBuffer(_InitialState(shape=(3, 2), dtype=np.dtype(dtype), fill_value=-1), device="cpu")
    assert buffer.read().tolist() == [[-1, -1]] * 3
    buffer.write([0, 2], 5)
    assert (buffer.read().dtype, buffer.read().tolist()) == (dtype, [[5, 5], [-1, -1], [5, 5]])


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[1, 2]], None, "`ids` is 1x2, expected 2xN ids"),
        ([1, 2], None, "`ids` is 2, expected 2xN ids"),
        (np.zeros((2, 0), int), None, "`ids` is 2x0, expected 2xN ids with N at least 1"),
        ([[1.0], [2.0]], None, "`ids` is float64, expected integers"),
        ([[1], [2, 3]], None, "`ids` cannot be read as an array"),
        ([[1], [61]], None, r"ids must be in 0\.\.60 \(got 1\.\.61\)"),
        ([[-1], [3]], None, r"ids must be in 0\.\.60 \(got -1\.\.3\)"),
        ([[1, 2], [3, 4]], [[1, 1]], "the mask is 1x2, but `ids` is 2x2"),
        ([[1, 2], [3, 4]], [[1, 1], [0, 1]], "must be ones followed by zeros"),
        ([[1, 2], [3, 4]], [[1, 2], [1, 1]], "must be ones followed by zeros"),
        (np.zeros((2, MAX_STEP_TOKENS + 1), int), None, f"`ids` is 2x{MAX_STEP_TOKENS + 1}: axis 1 takes 1..{MAX_STEP_TOKENS}"),
    ],
)
def test_an_invalid_step_is_rejected_without_effect(decoder: Engine, ids: Any, mask: Any, message: str) -> None:
    with decoder.session(2) as session:
        check(session, [3, 2])
        with pytest.raises(ShapeError, match=message):
            session.step(ids, mask)
        check(session, [2, 1])


def test_a_mask_is_rejected_by_a_decoder_without_a_mask_input(maskless: Engine) -> None:
    with maskless.session() as session, pytest.raises(ShapeError, match="this decoder has no mask input"):
        session.step([[1, 2]], [[1, 0]])


@pytest.mark.parametrize("batch", [0, MAX_BATCH + 1])
def test_a_batch_outside_the_profiles_is_rejected(decoder: Engine, batch: int) -> None:
    with pytest.raises(ShapeError, match=f"axis 0 takes 1..{MAX_BATCH}, got {batch}"):
        decoder.session(batch)


def test_a_step_beyond_the_capacity_is_rejected_without_effect(decoder: Engine) -> None:
    with decoder.session(2) as session:
        for counts in ([12, 1], [12, 1], [12, 1]):
            check(session, counts)
        before = {state.name: session.read_state(state.name) for state in session.decoder.states}
        with pytest.raises(ShapeError, match=f"row 0 has 36 tokens; 5 more would exceed the capacity of {CAPACITY}") as caught:
            session.step(SEQUENCES[:2, :5])
        assert "rewrite the model with a larger capacity" in str(caught.value.hint)
        assert session.lengths.tolist() == [36, 3]
        for name, array in before.items():
            np.testing.assert_array_equal(session.read_state(name), array)
        check(session, [4, 5])


def test_without_a_capacity_the_length_is_unlimited(tmp_path: Path) -> None:
    spec = interface(capacity=None)
    with registry.find_backend("onnxruntime").open(str(write(tmp_path / "m.onnx", capacity=None))) as ort_session:
        with DecodeSession(StepGraph(session=ort_session, interface=spec, profiles=(profile.derive_profile(spec),))) as session:
            for _ in range(CAPACITY + 3):
                session.step([[1]])
            assert session.lengths.tolist() == [CAPACITY + 3]


def test_after_a_failed_step_every_row_must_be_reset(no_slack: Engine) -> None:
    with no_slack.session(2) as session:
        for counts in ([12, 1], [12, 1], [12, 1]):
            check(session, counts)
        with pytest.raises(BackendError, match="failed on `.*`: TensorScatter .* failed: "):
            step(session, [1, 1], width=MAX_STEP_TOKENS)
        for rows in ([], [0]):
            session.reset(rows)
            with pytest.raises(RyzenError, match="the states are undefined because a step failed") as caught:
                session.step([[1], [1]])
            assert caught.value.hint == "reset() every row"
        session.reset()
        check(session, [5, 3])


@pytest.mark.parametrize("rows", [[-1], [2], [0, 5]])
def test_rows_that_do_not_exist_cannot_be_reset(decoder: Engine, rows: list[int]) -> None:
    with decoder.session(2) as session:
        check(session, [1, 1])
        with pytest.raises(UsageError, match="this session has no row"):
            session.reset(rows)
        assert session.lengths.tolist() == [1, 1]


def non_decoders() -> Iterator[tuple[Interface, str]]:
    """Yield interfaces that do not describe a decoder with fixed-size states, each with the reason."""
    spec = interface()
    replace = msgspec.structs.replace
    ids, mask, seen, *caches = spec.inputs
    seen_state, key, *others = spec.states
    positions = replace(mask, name="positions", role="positions")
    growing = replace(key, append_axis=2)
    dynamic = replace(caches[0], dims=("batch", HEADS, "slots", HEAD_SIZE))
    past_mask = replace(mask, dims=("batch", "past+seq"))
    yield replace(spec, states=(), inputs=(ids, mask)), "it has no states"
    yield replace(spec, states=(seen_state, growing, *others)), "the state `key.0` grows at each step"
    yield replace(spec, inputs=(ids, mask, seen, dynamic, *caches[1:])), "`?past.key.0.* has no fixed shape"
    yield replace(spec, inputs=(ids, mask, replace(seen, dims=()), *caches)), "seen.* has no fixed shape"
    yield replace(spec, inputs=(mask, seen, *caches)), "it has 0 inputs of ids"
    yield (
        replace(spec, inputs=(ids, past_mask, seen, *caches)),
        "its mask mask: .* does not cover the tokens of one step, as ids: ",
    )
    inverted = replace(mask, padding_value=1)
    yield replace(spec, inputs=(ids, inverted, seen, *caches)), r"its mask mask: int64.* marks padding with 1, expected 0"
    yield replace(spec, inputs=(ids, mask, positions, seen, *caches)), "`positions` is neither ids, a mask nor a state"
    yield replace(spec, outputs=spec.outputs[1:]), "its first output that is not a state has no logits"


@pytest.mark.parametrize(("spec", "message"), list(non_decoders()))
def test_the_reason_why_an_interface_is_not_a_decoder_is_reported(spec: Interface, message: str) -> None:
    with pytest.raises(RyzenError, match=message) as caught:
        make_decoder_spec(spec)
    advice = "rewrite MODEL.onnx decode.onnx --passes 'kv-static{capacity=" if spec.states else "export hf:FOLDER dec/"
    assert f"ryzen-compile {advice}" in str(caught.value.hint)


def test_a_model_that_is_not_a_decoder_has_no_session(tmp_path: Path) -> None:
    package = rc.build(tiny_models.write(tmp_path / "small.onnx"), gpu="cpu", compare=False, cache=False)
    with rc.load(package.path) as engine:
        with pytest.raises(RyzenError, match="not a decoder with fixed-size states: it has no states") as caught:
            engine.session()
        assert "ryzen-compile export hf:FOLDER dec/" in (caught.value.hint or "")
        with pytest.raises(RyzenError, match="not a decoder with fixed-size states"):
            engine.generate([1], max_new_tokens=1)


def test_a_closed_session_and_a_closed_engine_are_errors(decoder: Engine, tmp_path: Path) -> None:
    session = decoder.session()
    session.close()
    session.close()
    for use in (lambda: session.step([[1]]), lambda: session.reset(), lambda: session.read_state("seen")):
        with pytest.raises(RyzenError, match="this session is closed"):
            use()
    package = rc.build(write(tmp_path / "tiny.onnx"), gpu="cpu", compare=False, cache=False)
    engine = rc.load(package.path)
    with engine.session() as open_session:
        engine.close()
        with pytest.raises(BackendError, match="is closed"):
            open_session.step([[1]])
    with pytest.raises(RyzenError, match="this engine is closed"):
        engine.session()


def test_sessions_of_one_engine_run_in_several_threads(decoder: Engine) -> None:
    failures: list[BaseException] = []

    def run_steps(batch: int) -> None:
        try:
            with decoder.session(batch) as session:
                for at in range(20):
                    check(session, [1 + (at + row) % 2 for row in range(batch)])
        except AssertionError as error:
            failures.append(error)

    threads = [threading.Thread(target=run_steps, args=(batch,)) for batch in (1, 2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@contextmanager
def memory_growth_below(limit: int) -> Iterator[None]:
    process = psutil.Process()
    before = process.memory_info().rss
    yield
    assert process.memory_info().rss - before < limit


@pytest.mark.parametrize("name", ["decoder", "double_buffered"])
def test_two_thousand_steps_do_not_increase_memory(name: str, request: pytest.FixtureRequest) -> None:
    engine: Engine = request.getfixturevalue(name)
    with engine.session(MAX_BATCH) as session:

        def run_steps(count: int) -> None:
            for at in range(count):
                if session.lengths.max() > CAPACITY - MAX_STEP_TOKENS:
                    session.reset([at % MAX_BATCH, int(session.lengths.argmax())])
                session.step(SEQUENCES[:, : 1 + at % MAX_STEP_TOKENS if at % 5 == 0 else 1])

        run_steps(300)
        with memory_growth_below(2 * 2**20):
            run_steps(2000)


def test_interfaces_without_capacity_and_in_place_are_read() -> None:
    fields = msgspec.to_builtins(interface())
    del fields["capacity"]
    for state in fields["states"]:
        del state["in_place"]
    decoded = msgspec.json.decode(msgspec.json.encode(fields), type=Interface)
    assert decoded.capacity is None
    assert not any(state.in_place for state in decoded.states)
