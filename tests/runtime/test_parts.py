"""Several graphs over one memory of states: an engine of them does what each does with the states handed on by hand."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import psutil
import pytest
from support.decoders import VOCABULARY, export, torch_steps

import ryzen_compile as rc
from ryzen_compile.artifacts.package.read import Package, read_package
from ryzen_compile.backends.onnxruntime.state_binding import OnnxRuntimeStateBinding
from ryzen_compile.builder.rewrite import RewriteConfig, parse_step_widths, rewrite, rewrite_steps
from ryzen_compile.cli.main import run
from ryzen_compile.errors import BackendError, RyzenError, ShapeError, UsageError
from ryzen_compile.runtime.choose import EngineChoice, choose
from ryzen_compile.runtime.generation.decoder_spec import nearest_size
from ryzen_compile.runtime.generation.generate import GeneratedSequence
from ryzen_compile.runtime.generation.session import DecodeSession
from ryzen_compile.runtime.load import Engine, _choose_graphs
from ryzen_compile.spec.interface import Interface

STATIC, EVICT = "kv-static{capacity=64}", "kv-static{capacity=64},kv-evict{budget=25%,sinks=2,recent-window=4}"
PROMPTS = [np.random.default_rng(at).integers(0, VOCABULARY, length) for at, length in enumerate((40, 3, 45, 21, 1))]
BUDGET = 16


def made(folder: Path, passes: str, widths: tuple[int, ...]) -> Package:
    rewrite_steps(export("llama", "optimum-sdpa"), folder / "steps", RewriteConfig(passes=passes), widths)
    return rc.build(folder / "steps", gpu="cpu", compare=False, cache=False)


@pytest.fixture(scope="module")
def evicting(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return made(tmp_path_factory.mktemp("evicting"), EVICT, (1, 0))


@pytest.fixture(scope="module")
def engine(evicting: Package) -> Iterator[Engine]:
    with rc.load(evicting.path) as engine:
        yield engine


def tokens_of(found: list[GeneratedSequence]) -> list[list[int]]:
    return [one.tokens.tolist() for one in found]


@functools.cache
def graph_session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(path, options)


class ByHand:
    """A batch of sequences, each step by the graph of its width, the states handed on as arrays."""

    def __init__(self, package: Package, batch: int) -> None:
        self.package, self.batch = package, batch
        self.told: Interface = package.manifest.graphs[0].interface
        self.states = {state.name: np.empty(0) for state in self.told.states}
        self.reset(range(batch))

    def reset(self, rows: Any) -> None:
        for state in self.told.states:
            spec = self.told.input(state.input)
            shape = [self.batch if isinstance(dim, str) else dim for dim in spec.dims or ()]
            whole = self.states[state.name] if self.states[state.name].size else np.empty(shape, spec.dtype)
            whole = whole.copy()
            whole[list(rows)] = state.initial_value
            self.states[state.name] = whole

    def step(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        name = "step-1" if ids.shape[1] == 1 else "step-any"
        graph = next(graph for graph in self.package.manifest.graphs if graph.name == name)
        session = graph_session(self.package.path / graph.variants[0].path)
        feed = {state.input: self.states[state.name] for state in graph.interface.states}
        names = [entry.name for entry in session.get_outputs()]
        found = dict(zip(names, session.run(None, {**feed, "input_ids": ids, "attention_mask": mask}), strict=True))
        self.states = {state.name: found[state.output] for state in graph.interface.states}
        return np.asarray(found["logits"])


def test_steps_of_both_graphs_are_what_they_are_with_states_handed_on(engine: Engine, evicting: Package) -> None:
    random = np.random.default_rng(5)
    with engine.session(2) as session:
        by_hand, turns, longest = ByHand(evicting, 2), [], 0
        for at in range(60):
            seq = 1 if at % 7 > 2 else int(random.integers(2, 24))
            ids = random.integers(0, VOCABULARY, (2, seq))
            mask = (np.arange(seq) < random.integers(0, seq + 1, (2, 1))).astype(np.int64)
            np.testing.assert_array_equal(session.step(ids, mask)[mask > 0], by_hand.step(ids, mask)[mask > 0])
            turns.append(turn_of(session))
            longest = max(longest, *session.lengths)
            if at in (30, 41):
                session.reset([at % 2])
                by_hand.reset([at % 2])
            for name, whole in by_hand.states.items():
                np.testing.assert_array_equal(session.read_state(name), whole)
        assert set(turns) == {0, 1}
        assert longest > 4 * BUDGET


def turn_of(session: DecodeSession) -> int:
    """Return the place of the graph that is bound to the states."""
    steps = [steps for _, steps in session._bindings]
    return next(
        at for at, one in enumerate(steps) if isinstance(one, OnnxRuntimeStateBinding) and one._state_buffers.active is one
    )


def test_two_graphs_generate_what_one_does(tmp_path: Path) -> None:
    both = made(tmp_path, STATIC, (1, 0))
    rewrite(export("llama", "optimum-sdpa"), tmp_path / "one.onnx", RewriteConfig(passes=STATIC))
    alone = rc.build(tmp_path / "one.onnx", gpu="cpu", compare=False, cache=False)
    options: dict[str, Any] = {"max_new_tokens": 24, "chunk": 16, "temperature": 0.8, "seed": 4}
    with rc.load(both.path) as engine, rc.load(alone.path) as other:
        for prompts in (PROMPTS, PROMPTS[:1], [PROMPTS[1], PROMPTS[2]]):
            found = engine.generate(prompts, **options)
            assert tokens_of(found) == tokens_of(other.generate(prompts, **options))
        greedy = engine.generate(PROMPTS[1], max_new_tokens=8)[0].tokens
    ids = np.array([[*PROMPTS[1], *greedy]])
    assert torch_steps("llama", ids, [ids.shape[1]])[0, len(PROMPTS[1]) - 1 : -1].argmax(axis=1).tolist() == greedy.tolist()


def test_prompts_beyond_the_budget_are_each_as_alone_and_again(engine: Engine) -> None:
    options: dict[str, Any] = {"max_new_tokens": 40, "chunk": 16}
    alone = [engine.generate(prompt, **options)[0].tokens.tolist() for prompt in PROMPTS]
    assert [engine.generate(prompt, **options)[0].tokens.tolist() for prompt in PROMPTS] == alone
    # Rows of equal lengths go through the same graphs together as alone.
    pair = engine.generate([PROMPTS[0], np.roll(PROMPTS[0], 3)], **options)
    assert tokens_of(pair)[0] == alone[0]


def places(session: DecodeSession, name: str) -> list[int]:
    steps = session._first_binding
    assert isinstance(steps, OnnxRuntimeStateBinding)
    return [place.ort_value.data_ptr() for place in steps._state_buffers.buffers[name]._buffers]


def test_the_second_memory_is_there_for_the_graph_that_needs_it(engine: Engine) -> None:
    name, ids = "past_key_values.0.key", np.ones((2, 5), np.int64)
    with engine.session(2) as session:
        (one,) = places(session, name)
        assert len(places(session, "length")) == 2
        session.step(ids[:, :1])
        session.step(ids[:, :1])
        assert places(session, name) == [one]
        session.step(ids)
        after = places(session, name)
        assert len(after) == 2
        assert after[1] == one
        session.step(ids)
        assert places(session, name) == after[::-1]
        session.step(ids)
        session.step(ids[:, :1])
        assert places(session, name) == after[:1]
        bound = [steps._binding for _, steps in session._bindings if isinstance(steps, OnnxRuntimeStateBinding)]
        assert [binding is None for binding in bound] == [False, True]


def test_taking_turns_takes_no_memory(engine: Engine) -> None:
    ids = np.ones((2, 5), np.int64)
    process = psutil.Process()
    with engine.session(2) as session:

        def turns(count: int) -> None:
            for _ in range(count):
                session.step(ids)
                session.step(ids[:, :1])

        turns(200)
        before = process.memory_info().rss
        turns(1000)
        assert process.memory_info().rss - before < 2 * 2**20


def test_an_engine_of_several_graphs_runs_by_shapes_and_tells_of_all(engine: Engine, evicting: Package) -> None:
    assert "step-1.fp32.onnx" in engine.choice.summary
    assert "step-any.fp32.onnx" in engine.choice.summary
    told = engine.interface
    assert told.input("input_ids").dims == ("batch_size", "sequence_length")
    for seq in (1, 4):
        sizes = {"batch_size": 1, "sequence_length": seq}
        feed = {spec.name: np.zeros([sizes.get(str(dim), dim) for dim in spec.dims or ()], spec.dtype) for spec in told.inputs}
        assert engine.run(feed)["logits"].shape == (1, seq, VOCABULARY)
    with pytest.raises(ShapeError, match="axis 1 takes 1..64, got 65"):
        engine.session().step(np.zeros((1, 65), np.int64))
    with rc.load(evicting.path, graph="step-1") as alone, pytest.raises(ShapeError, match="axis 1 takes 1..1, got 4"):
        alone.session().step(np.zeros((1, 4), np.int64))


def test_decoders_that_were_not_made_together_are_not_run_together(tmp_path: Path) -> None:
    files = {}
    for name, passes in (("a", EVICT), ("b", EVICT.replace("evict{", "evict{score=value-norm,"))):
        rewrite_steps(export("llama", "optimum-sdpa"), tmp_path / name, RewriteConfig(passes=passes), (1,))
        files[name] = tmp_path / name / "step-1.onnx"
    package = rc.build(files, tmp_path / "both.ryzen", gpu="cpu", compare=False, cache=False)
    with pytest.raises(UsageError, match="holds several graphs") as caught:
        rc.load(package.path)
    assert caught.value.hint == "name one of a, b"


def test_one_backend_serves_all_graphs_of_an_engine(evicting: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(manifest: Any, graph: str, backend: str | None) -> tuple[Any, EngineChoice]:
        one, choice = choose(manifest, graph, "onnxruntime")
        refused = graph == "step-any" or backend is not None
        return one, choice if refused else dataclasses.replace(choice, backend="tensorrt-rtx")

    monkeypatch.setattr("ryzen_compile.runtime.load.choose", torn)
    chosen = _choose_graphs(evicting.manifest, None, None)
    assert [(one.name, choice.backend) for one, choice in chosen] == [("step-1", "onnxruntime"), ("step-any", "onnxruntime")]


@pytest.mark.parametrize(
    ("wanted", "room", "size"),
    [(1, None, 1), (3, None, 16), (40, None, 16), (3, 16, 16), (3, 15, 1), (16, 2, 1), (1, 1, 1)],
)
def test_a_step_is_as_wide_as_what_it_feeds_and_no_wider_than_what_is_left(wanted: int, room: int | None, size: int) -> None:
    assert nearest_size(wanted, ((1, 1), (16, 16)), room) == size


def test_of_any_width_it_is_what_is_left() -> None:
    assert [nearest_size(wanted, ((1, 64),), 10) for wanted in (3, 10, 30)] == [3, 10, 10]


def test_states_that_differ_are_not_shared(engine: Engine) -> None:
    one, other = engine._step_graphs
    states = one.interface.states
    shapes = {state.input: (1, *engine.session().decoder.state_row_shapes[state.input]) for state in states}
    first = one.session.bind_states(states, shapes)
    with pytest.raises(BackendError, match="the state `length` is another in each of two graphs"):
        other.session.bind_states(states, shapes | {"past_length": (2,)}, share_with=first)


def test_steps_of_one_width_end_where_no_more_fit(tmp_path: Path) -> None:
    both = made(tmp_path, "kv-static{capacity=40}", (1, 16))
    prompt = PROMPTS[0][:38]
    with rc.load(both.path) as engine:
        (found,) = engine.generate(prompt, max_new_tokens=9)
        assert found.finish_reason == "capacity"
        assert engine.session().width_ranges == ((1, 1), (16, 16))
    ids = np.array([[*prompt, *found.tokens[:-1]]])
    assert ids.shape[1] == 40
    assert torch_steps("llama", ids, [40])[0, 37:].argmax(axis=1).tolist() == found.tokens.tolist()


def test_rewrite_writes_a_folder_that_builds_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, folder = str(export("llama", "optimum-sdpa")), str(tmp_path / "decode")
    assert run(["rewrite", model, folder, "--passes", STATIC, "--steps", "1,any", "--weights", "inline"]) == 2
    assert run(["rewrite", model, folder, "--passes", "fold", "--steps", "1,any"]) == 2
    assert "kv-static{capacity=4096}" in capsys.readouterr().err
    assert run(["rewrite", model, model, "--passes", STATIC, "--steps", "1"]) == 1
    assert not Path(folder).exists()
    assert run(["rewrite", model, folder, "--passes", STATIC, "--steps", "1,any"]) == 0
    weights = list(Path(folder, "weights").iterdir())
    assert sum(file.stat().st_size for file in weights) < Path(model).stat().st_size
    assert run(["build", folder, "--gpu", "cpu", "--no-cache", "-q"]) == 0
    package = read_package(tmp_path / "decode.ryzen")
    assert [graph.name for graph in package.manifest.graphs] == ["step-1", "step-any"]
    families = {graph.interface.decoder_group for graph in package.manifest.graphs}
    assert len(families) == 1
    assert None not in families


@pytest.mark.parametrize("text", ["", "0", "1,", "-1", "one", "1.5", "1 2"])
def test_widths_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no width of a step"):
        parse_step_widths(text)


def test_widths_are_read_in_order() -> None:
    assert parse_step_widths("128, any,1") == (128, 0, 1)


def test_a_file_is_no_folder_for_graphs(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("")
    with pytest.raises(RyzenError, match="is there and is no folder"):
        rewrite_steps(export("llama", "optimum-sdpa"), tmp_path / "there", RewriteConfig(passes=STATIC), (1,))
