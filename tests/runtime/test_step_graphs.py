"""Step graphs over shared states: an engine of them computes what each graph computes with states passed as arrays."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from support.decoders import VOCABULARY, export, torch_steps
from support.ort_session import open_session

import ryzen_compile as rc
from ryzen_compile.artifacts.package.read import Package, read_package
from ryzen_compile.backends.onnxruntime.state_binding import OnnxRuntimeStateBinding
from ryzen_compile.builder.rewrite import RewriteConfig, parse_step_widths, rewrite, rewrite_steps
from ryzen_compile.cli.main import run
from ryzen_compile.errors import BackendError, ShapeError, UsageError
from ryzen_compile.runtime.choose import EngineChoice, choose
from ryzen_compile.runtime.generation.decoder_spec import nearest_size
from ryzen_compile.runtime.generation.generate import GeneratedSequence
from ryzen_compile.runtime.generation.session import DecodeSession
from ryzen_compile.runtime.load import Engine, _choose_graphs
from ryzen_compile.spec.interface import Interface

STATIC, EVICT = "kv-static{capacity=64}", "kv-static{capacity=64},kv-evict{score=knorm,budget=25%,sinks=2,recent-window=4}"
PROMPTS = [np.random.default_rng(index).integers(0, VOCABULARY, length) for index, length in enumerate((40, 3, 45, 21, 1))]
BUDGET = 16


def build_step_graphs(folder: Path, passes: str, widths: tuple[int, ...]) -> Package:
    rewrite_steps(export("llama", "optimum-sdpa"), folder / "steps", RewriteConfig(passes=passes), widths)
    return rc.build(folder / "steps", gpu="cpu", compare=False, cache=False)


@pytest.fixture(scope="module")
def evicting(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return build_step_graphs(tmp_path_factory.mktemp("evicting"), EVICT, (1, 0))


@pytest.fixture(scope="module")
def engine(evicting: Package) -> Iterator[Engine]:
    with rc.load(evicting.path) as engine:
        yield engine


def tokens_of(sequences: list[GeneratedSequence]) -> list[list[int]]:
    return [sequence.tokens.tolist() for sequence in sequences]


graph_session = functools.cache(open_session)


class ArrayStateSession:
    """A batch of sequences whose states are passed from step to step as arrays; each step runs the graph of its width."""

    def __init__(self, package: Package, batch: int) -> None:
        self.package, self.batch = package, batch
        self.interface: Interface = package.manifest.graphs[0].interface
        self.states = {state.name: np.empty(0) for state in self.interface.states}
        self.reset(range(batch))

    def reset(self, rows: Any) -> None:
        for state in self.interface.states:
            spec = self.interface.input(state.input)
            shape = [self.batch if isinstance(dim, str) else dim for dim in spec.dims or ()]
            array = self.states[state.name] if self.states[state.name].size else np.empty(shape, spec.dtype)
            array = array.copy()
            array[list(rows)] = state.initial_value
            self.states[state.name] = array

    def step(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        name = "step-1" if ids.shape[1] == 1 else "step-any"
        graph = next(graph for graph in self.package.manifest.graphs if graph.name == name)
        session = graph_session(self.package.path / graph.variants[0].path)
        states = {state.input: self.states[state.name] for state in graph.interface.states}
        names = [output.name for output in session.get_outputs()]
        outputs = dict(zip(names, session.run(None, {**states, "input_ids": ids, "attention_mask": mask}), strict=True))
        self.states = {state.name: outputs[state.output] for state in graph.interface.states}
        return np.asarray(outputs["logits"])


def test_steps_of_both_graphs_equal_steps_with_states_passed_as_arrays(engine: Engine, evicting: Package) -> None:
    rng = np.random.default_rng(5)
    with engine.session(2) as session:
        reference, active_graphs, max_length = ArrayStateSession(evicting, 2), [], 0
        for index in range(60):
            seq = 1 if index % 7 > 2 else int(rng.integers(2, 24))
            ids = rng.integers(0, VOCABULARY, (2, seq))
            mask = (np.arange(seq) < rng.integers(0, seq + 1, (2, 1))).astype(np.int64)
            np.testing.assert_array_equal(session.step(ids, mask)[mask > 0], reference.step(ids, mask)[mask > 0])
            active_graphs.append(active_graph(session))
            max_length = max(max_length, *session.lengths)
            if index in (30, 41):
                session.reset([index % 2])
                reference.reset([index % 2])
            for name, array in reference.states.items():
                np.testing.assert_array_equal(session.read_state(name), array)
        assert set(active_graphs) == {0, 1}
        assert max_length > 4 * BUDGET


def active_graph(session: DecodeSession) -> int:
    """Return the index of the graph that is bound to the states."""
    return next(
        index
        for index, (_, binding) in enumerate(session._bindings)
        if isinstance(binding, OnnxRuntimeStateBinding) and binding._state_buffers.active is binding
    )


def test_two_step_graphs_generate_the_tokens_of_one_graph(tmp_path: Path) -> None:
    both = build_step_graphs(tmp_path, STATIC, (1, 0))
    rewrite(export("llama", "optimum-sdpa"), tmp_path / "one.onnx", RewriteConfig(passes=STATIC))
    single = rc.build(tmp_path / "one.onnx", gpu="cpu", compare=False, cache=False)
    options: dict[str, Any] = {"max_new_tokens": 24, "chunk": 16, "temperature": 0.8, "seed": 4}
    with rc.load(both.path) as engine, rc.load(single.path) as other:
        for prompts in (PROMPTS, PROMPTS[:1], [PROMPTS[1], PROMPTS[2]]):
            assert tokens_of(engine.generate(prompts, **options)) == tokens_of(other.generate(prompts, **options))
        greedy = engine.generate(PROMPTS[1], max_new_tokens=8)[0].tokens
    ids = np.array([[*PROMPTS[1], *greedy]])
    assert torch_steps("llama", ids, [ids.shape[1]])[0, len(PROMPTS[1]) - 1 : -1].argmax(axis=1).tolist() == greedy.tolist()


def test_prompts_beyond_the_budget_generate_the_same_tokens_repeatedly_and_in_a_batch(engine: Engine) -> None:
    options: dict[str, Any] = {"max_new_tokens": 40, "chunk": 16}
    single = [engine.generate(prompt, **options)[0].tokens.tolist() for prompt in PROMPTS]
    assert [engine.generate(prompt, **options)[0].tokens.tolist() for prompt in PROMPTS] == single
    # Rows of equal lengths run the same graphs in a batch as alone.
    pair = engine.generate([PROMPTS[0], np.roll(PROMPTS[0], 3)], **options)
    assert tokens_of(pair)[0] == single[0]


def addresses(session: DecodeSession, name: str) -> list[int]:
    """Return the addresses of the buffers of a state."""
    binding = session._first_binding
    assert isinstance(binding, OnnxRuntimeStateBinding)
    return [buffer.ort_value.data_ptr() for buffer in binding._state_buffers.buffers[name]._buffers]


def test_the_second_buffer_exists_while_a_graph_that_needs_it_is_active(engine: Engine) -> None:
    name, ids = "past_key_values.0.key", np.ones((2, 5), np.int64)
    with engine.session(2) as session:
        (single,) = addresses(session, name)
        assert len(addresses(session, "length")) == 2
        session.step(ids[:, :1])
        session.step(ids[:, :1])
        assert addresses(session, name) == [single]
        session.step(ids)
        after = addresses(session, name)
        assert len(after) == 2
        assert after[1] == single
        session.step(ids)
        assert addresses(session, name) == after[::-1]
        session.step(ids)
        session.step(ids[:, :1])
        assert addresses(session, name) == after[:1]
        io_bindings = [binding._binding for _, binding in session._bindings if isinstance(binding, OnnxRuntimeStateBinding)]
        assert [io_binding is None for io_binding in io_bindings] == [False, True]


def test_alternating_graphs_do_not_increase_memory(engine: Engine) -> None:
    ids = np.ones((2, 5), np.int64)
    process = psutil.Process()
    with engine.session(2) as session:

        def alternate(count: int) -> None:
            for _ in range(count):
                session.step(ids)
                session.step(ids[:, :1])

        alternate(200)
        before = process.memory_info().rss
        alternate(1000)
        assert process.memory_info().rss - before < 2 * 2**20


def mapped_weights(package: Package) -> set[str]:
    """Return the names of the weight files of `package` that are mapped in this process."""
    folder = f"{package.path}/graphs/weights/"
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.partition(folder)[2] for line in lines if folder in line}


def matrices(package: Package) -> set[str]:
    """Return the names of the files of large weights in `package`."""
    names = {
        weight.path.rpartition("/")[2]
        for weight in package.manifest.files
        if weight.path.startswith("graphs/weights/") and weight.size_bytes >= 1 << 14
    }
    assert names
    return names


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_step_graphs_share_mapped_weights_and_copy_those_of_single_tokens_for_batches(
    tmp_path: Path,
) -> None:
    package = build_step_graphs(tmp_path, STATIC, (1, 0))
    with rc.load(package.path, share_weights=True) as engine:
        assert matrices(package) <= mapped_weights(package)
        single = engine._step_graphs_for(1)
        assert engine._step_graphs_for(2)[0] is not single[0]
        assert engine._step_graphs_for(2)[1] is single[1]
        assert engine._step_graphs_for(3) is engine._step_graphs_for(2)
        alone = [engine.generate(prompt, max_new_tokens=4)[0] for prompt in PROMPTS[:2]]
        assert tokens_of(alone) == tokens_of(engine.generate(PROMPTS[:2], max_new_tokens=4))
    assert not mapped_weights(package)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("share_weights", "available"), [(None, 1 << 40), (False, 1)])
def test_weights_are_copied_into_the_layout_of_the_backend(
    share_weights: bool | None, available: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["ryzen_compile.runtime.load"], "available_memory_bytes", lambda: available)
    package = build_step_graphs(tmp_path, STATIC, (1, 0))
    with rc.load(package.path, share_weights=share_weights) as engine:
        assert not matrices(package) <= mapped_weights(package)
        assert engine._step_graphs_for(2) is engine._step_graphs_for(1)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_are_shared_if_copies_would_take_more_than_a_quarter_of_the_available_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = build_step_graphs(tmp_path, STATIC, (1, 0))
    weights = sum(file.size_bytes for file in package.manifest.files if file.path.startswith("graphs/weights/"))
    monkeypatch.setattr(sys.modules["ryzen_compile.runtime.load"], "available_memory_bytes", lambda: 6 * weights)
    with rc.load(package.path):
        assert matrices(package) <= mapped_weights(package)


def test_an_engine_of_several_graphs_selects_by_shapes_and_lists_all_graphs(engine: Engine, evicting: Package) -> None:
    assert "step-1.fold.onnx" in engine.choice.summary
    assert "step-any.fold.onnx" in engine.choice.summary
    interface = engine.interface
    assert interface.input("input_ids").dims == ("batch_size", "sequence_length")
    for seq in (1, 4):
        sizes = {"batch_size": 1, "sequence_length": seq}
        inputs = {
            spec.name: np.zeros([sizes.get(str(dim), dim) for dim in spec.dims or ()], spec.dtype) for spec in interface.inputs
        }
        assert engine.run(inputs)["logits"].shape == (1, seq, VOCABULARY)
    with pytest.raises(ShapeError, match="axis 1 takes 1..64, got 65"):
        engine.session().step(np.zeros((1, 65), np.int64))
    with rc.load(evicting.path, graph="step-1") as single, pytest.raises(ShapeError, match="axis 1 takes 1..1, got 4"):
        single.session().step(np.zeros((1, 4), np.int64))


def test_step_graphs_of_different_rewrites_are_not_combined(tmp_path: Path) -> None:
    files = {}
    for name, passes in (("a", EVICT), ("b", EVICT.replace("knorm", "value-norm"))):
        rewrite_steps(export("llama", "optimum-sdpa"), tmp_path / name, RewriteConfig(passes=passes), (1,))
        files[name] = tmp_path / name / "step-1.onnx"
    package = rc.build(files, tmp_path / "both.ryzen", gpu="cpu", compare=False, cache=False)
    with pytest.raises(UsageError, match="contains several graphs") as caught:
        rc.load(package.path)
    assert caught.value.hint == "name one of a, b"


def test_all_graphs_of_an_engine_run_on_one_backend(evicting: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    def choose_different_backends(
        manifest: Any, graph: str, variant: str | None, backend: str | None
    ) -> tuple[Any, EngineChoice]:
        record, choice = choose(manifest, graph, None, "onnxruntime")
        portable = graph == "step-any" or backend is not None
        return record, choice if portable else dataclasses.replace(choice, backend="tensorrt-rtx")

    monkeypatch.setattr("ryzen_compile.runtime.load.choose", choose_different_backends)
    choices = _choose_graphs(evicting.manifest, None, None, None)
    assert [(record.name, choice.backend) for record, choice in choices] == [
        ("step-1", "onnxruntime"),
        ("step-any", "onnxruntime"),
    ]


@pytest.mark.parametrize(
    ("size", "limit", "expected"),
    [(1, None, 1), (3, None, 16), (40, None, 16), (3, 16, 16), (3, 15, 1), (16, 2, 1), (1, 1, 1)],
)
def test_the_nearest_size_is_sufficient_and_within_the_limit_if_possible(size: int, limit: int | None, expected: int) -> None:
    assert nearest_size(size, ((1, 1), (16, 16)), limit) == expected


def test_the_nearest_size_in_one_range_is_limited() -> None:
    assert [nearest_size(size, ((1, 64),), 10) for size in (3, 10, 30)] == [3, 10, 10]


def test_states_that_differ_are_not_shared(engine: Engine) -> None:
    narrow, wide = engine._step_graphs
    states = narrow.interface.states
    shapes = {state.input: (1, *engine.session().decoder.state_row_shapes[state.input]) for state in states}
    binding = narrow.session.bind_states(states, shapes)
    with pytest.raises(BackendError, match="the state `length` differs between two graphs"):
        wide.session.bind_states(states, shapes | {"past_length": (2,)}, share_with=binding)


def test_generation_ends_at_the_capacity_with_step_graphs_of_fixed_width(tmp_path: Path) -> None:
    both = build_step_graphs(tmp_path, "kv-static{capacity=40}", (1, 16))
    prompt = PROMPTS[0][:38]
    with rc.load(both.path) as engine:
        (sequence,) = engine.generate(prompt, max_new_tokens=9)
        assert sequence.finish_reason == "capacity"
        assert engine.session().width_ranges == ((1, 1), (16, 16))
    ids = np.array([[*prompt, *sequence.tokens[:-1]]])
    assert ids.shape[1] == 40
    assert torch_steps("llama", ids, [40])[0, 37:].argmax(axis=1).tolist() == sequence.tokens.tolist()


def test_rewrite_writes_a_folder_that_builds_as_one_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, folder = str(export("llama", "optimum-sdpa")), str(tmp_path / "decode")
    assert run(["rewrite", model, folder, "--passes", STATIC, "--steps", "1,any", "--weights", "inline"]) == 2
    assert run(["rewrite", model, folder, "--passes", "fold", "--steps", "1,any"]) == 2
    assert "kv-static{capacity=4096}" in capsys.readouterr().err
    assert run(["rewrite", model, model, "--passes", STATIC, "--steps", "1"]) == 2
    assert "exists and is not a folder" in capsys.readouterr().err
    assert not Path(folder).exists()
    assert run(["rewrite", model, folder, "--passes", STATIC, "--steps", "1,any"]) == 0
    weights = list(Path(folder, "weights").iterdir())
    assert sum(file.stat().st_size for file in weights) < Path(model).stat().st_size
    assert run(["build", folder, "--gpu", "cpu", "--no-cache", "-q"]) == 0
    package = read_package(tmp_path / "decode.ryzen")
    assert [graph.name for graph in package.manifest.graphs] == ["step-1", "step-any"]
    # The graph of any width is tuned for a chunk of a prompt, here of the capacity.
    assert [graph.profiles[0].opt["input_ids"] for graph in package.manifest.graphs] == [(1, 1), (1, 64)]
    decoder_groups = {graph.interface.decoder_group for graph in package.manifest.graphs}
    assert len(decoder_groups) == 1
    assert None not in decoder_groups


@pytest.mark.parametrize("text", ["", "0", "1,", "-1", "one", "1.5", "1 2"])
def test_invalid_step_widths_are_rejected(text: str) -> None:
    with pytest.raises(UsageError, match="is not a step width"):
        parse_step_widths(text)


def test_step_widths_are_parsed_in_order() -> None:
    assert parse_step_widths("128, any,1") == (128, 0, 1)


def test_step_graphs_cannot_be_written_to_a_file(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("")
    with pytest.raises(UsageError, match="exists and is not a folder"):
        rewrite_steps(export("llama", "optimum-sdpa"), tmp_path / "there", RewriteConfig(passes=STATIC), (1,))
