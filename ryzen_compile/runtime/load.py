"""A package made ready: `load(path)` gives an engine, `engine.run(**inputs)` its outputs."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection, Container, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import msgspec

from ryzen_compile import registry
from ryzen_compile.artifacts.package.read import read_package
from ryzen_compile.data.validation import check_shapes
from ryzen_compile.errors import RyzenError, ShapeError, UsageError
from ryzen_compile.runtime.choose import EngineChoice, choose, merge_choices
from ryzen_compile.runtime.generation.generate import GeneratedSequence, Generation, GenerationLimits
from ryzen_compile.runtime.generation.sampling import SamplingParams
from ryzen_compile.runtime.generation.session import DecodeSession
from ryzen_compile.runtime.generation.step_graphs import StepGraph, graphs_by_width, share_states
from ryzen_compile.spec import profile
from ryzen_compile.spec.interface import with_dtypes

if TYPE_CHECKING:
    from ryzen_compile.artifacts.package.manifest import GraphRecord, Manifest
    from ryzen_compile.backends.api import Session
    from ryzen_compile.spec.interface import Interface
    from ryzen_compile.spec.profile import Profile

_TORCH_ONLY_DTYPES = frozenset({"bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"})
"""Element types that torch has and neither numpy nor its DLPack."""


class Engine:
    """A graph of a package on this machine, or several that are steps of one decoder.

    Calls from several threads are safe; closing waits for none of them. Use it as a context manager, or call `close`.
    """

    def __init__(
        self, step_graphs: tuple[StepGraph, ...], *, choice: EngineChoice, resources: ExitStack, load_seconds: float
    ) -> None:
        self._step_graphs = step_graphs
        self._resources = resources
        self._lock = threading.Lock()
        self._closed = False
        self._graph_by_shapes: dict[tuple[tuple[str, tuple[int, ...]], ...], StepGraph] = {}
        self.choice = choice
        """What serves the graph here, and why."""
        self.interface = step_graphs[-1].interface
        """Its inputs, outputs and states; of several graphs those of the one that takes the widest steps."""
        self.profiles = tuple(profile for part in step_graphs for profile in part.profiles)
        """The shapes that it was built for and compared at."""
        sequences = {spec.name for spec in self.interface.inputs if "sequence(" in spec.dtype}
        self._shaped_inputs = tuple(dict.fromkeys(name for one in self.profiles for name in one.min if name not in sequences))
        self.load_seconds = load_seconds
        """How long loading took, digests and just-in-time compilation included."""

    def run(self, input_feed: Mapping[str, Any] | None = None, /, **inputs: Any) -> dict[str, Any]:
        """Run once and return the outputs by name.

        Inputs are numpy arrays or torch tensors, by name; names that are no Python identifiers go into the mapping `feed`.
        Where any input is a torch tensor the outputs are torch tensors, handed over without a copy, in sequences too; what
        torch has no type for, such as strings, stays what it is. Raises ShapeError for a name, type or shape that does not
        fit, shapes outside of every profile included.
        """
        given = {**(input_feed or {}), **inputs}
        self._check_open()
        outputs = self._select_step_graph(given).session.run(given)
        if any(_is_torch(value) for value in given.values()):
            return {name: _to_torch(value) for name, value in outputs.items()}
        return dict(outputs)

    def __call__(self, input_feed: Mapping[str, Any] | None = None, /, **inputs: Any) -> Any:
        """Run once and return the only output, or a tuple of all in their order."""
        outputs = self.run(input_feed, **inputs)
        values = tuple(outputs[spec.name] for spec in self.interface.outputs)
        return values[0] if len(values) == 1 else values

    def session(self, batch: int = 1) -> DecodeSession:
        """Begin `batch` sequences on a decoder, whose states stay where it computes from step to step.

        Raises RyzenError where this is no decoder of fixed-size states, ShapeError where no profile takes `batch`.
        """
        self._check_open()
        return DecodeSession(*self._step_graphs, batch=batch)

    def generate(
        self,
        ids: Any,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: Collection[int] = (),
        chunk: int = 128,
    ) -> list[GeneratedSequence]:
        """Continue a sequence of ids, or each of several of any lengths, and return what is new of each and why it ended.

        A `temperature` of 0 is greedy. The n-th sequence draws from `seed + n`, whatever else is in its batch. Prompts are fed
        at most `chunk` tokens at a time. Raises RyzenError where this is no decoder of fixed-size states, ShapeError for ids
        that it cannot take, UsageError for numbers out of range.
        """
        sampling = SamplingParams(
            repetition_penalty=repetition_penalty, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
        )
        limits = GenerationLimits(max_new_tokens=max_new_tokens, stop=frozenset(stop), chunk=chunk)
        return Generation(self, ids, sampling=sampling, limits=limits, seed=seed).collect()

    def stream(
        self,
        ids: Any,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: Collection[int] = (),
        chunk: int = 128,
    ) -> Iterator[tuple[int, int]]:
        """Do as `generate` does and yield each token as it comes, as (index of its sequence, id)."""
        sampling = SamplingParams(
            repetition_penalty=repetition_penalty, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
        )
        limits = GenerationLimits(max_new_tokens=max_new_tokens, stop=frozenset(stop), chunk=chunk)
        return Generation(self, ids, sampling=sampling, limits=limits, seed=seed).stream()

    def close(self) -> None:
        """Give back what the engine holds; closing twice is fine."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Engine {self.choice.summary}>"

    def _check_open(self) -> None:
        if self._closed:
            raise RyzenError("this engine is closed", hint="load the package again")

    def _select_step_graph(self, inputs: Mapping[str, Any]) -> StepGraph:
        """Return the first part that takes these shapes; what is missing or has none is its session's to name."""
        shapes = {name: shape for name in self._shaped_inputs if (shape := _shape(inputs.get(name))) is not None}
        key = tuple(shapes.items())
        if key in self._graph_by_shapes:
            return self._graph_by_shapes[key]
        *narrower, widest = self._step_graphs
        part = next((part for part in narrower if _accepts(part, shapes)), widest)
        if part is widest:
            _check_shapes(part, shapes)
        if len(self._graph_by_shapes) < 1024:
            self._graph_by_shapes[key] = part
        return part


def _check_shapes(step_graph: StepGraph, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Hold what has a shape to the interface and the profiles; raises ShapeError."""
    if all(spec.name in shapes for spec in step_graph.interface.inputs):
        check_shapes(step_graph.interface, shapes, source="this call")
    profile.select_profile((_restrict_profile(one, shapes) for one in step_graph.profiles), shapes)


def _accepts(step_graph: StepGraph, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    try:
        _check_shapes(step_graph, shapes)
    except ShapeError:
        return False
    return True


def _restrict_profile(full_profile: Profile, names: Container[str]) -> Profile:
    """Return the part of a profile that is about `names`."""
    return msgspec.structs.replace(full_profile, min={name: shape for name, shape in full_profile.min.items() if name in names})


def _shape(value: Any) -> tuple[int, ...] | None:
    """Return the shape of an array, a list or a number, or None for what has none, such as a ragged list."""
    import numpy as np

    if value is None or (hasattr(value, "__dlpack__") and not hasattr(value, "shape")):
        return None
    try:
        return tuple(np.shape(value))
    except (RuntimeError, TypeError, ValueError):
        return None


def _to_torch(value: Any) -> Any:
    """Return an output as torch holds it, over the same memory; what torch has no type for is returned as it is."""
    import numpy as np
    import torch

    if isinstance(value, list):
        return [_to_torch(one) for one in value]
    if isinstance(value, np.ndarray):
        if value.dtype.name in _TORCH_ONLY_DTYPES:
            return torch.from_dlpack(value.view(f"int{8 * value.dtype.itemsize}")).view(getattr(torch, value.dtype.name))
        if value.dtype.kind not in "biufc":
            return value
    return torch.from_dlpack(value) if hasattr(value, "__dlpack__") and not _is_torch(value) else value


def _is_torch(value: object) -> bool:
    return type(value).__module__.partition(".")[0] == "torch"


def load(
    path: str | os.PathLike[str],
    *,
    graph: str | None = None,
    backend: str | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> Engine:
    """Load a graph of the package at `path`: the best engine for this machine, else the portable graph.

    `graph` may be left out where the package holds one, or several that are steps of one decoder over the same states, as
    `rewrite --steps` makes them: the engine then runs each step by the graph that suits it. `backend` limits the choice.
    `cache` is the folder for kernels that TensorRT-RTX compiles on first load (default: the user's cache folder). Digests are
    checked before anything is read. Raises PackageError for a damaged package or when nothing in it runs here, UsageError for
    an unknown graph or backend.
    """
    started = time.perf_counter()
    if backend is not None and backend not in registry.names("backends"):
        raise UsageError(f"there is no backend `{backend}`", hint=f"known are {', '.join(registry.names('backends'))}")
    package = read_package(path)
    chosen = _choose_graphs(package.manifest, graph, backend)
    package.verify_digests(*(file for _, choice in chosen for file in choice.files))
    with ExitStack() as resources:
        kernels = Path(cache) if cache is not None else _kernel_cache_dir()
        parts = []
        for one, choice in chosen:
            opened = registry.find_backend(choice.backend).open(str(Path(package.path, choice.path)), cache_dir=str(kernels))
            session = resources.enter_context(opened)
            parts.append(
                StepGraph(session=session, interface=_with_session_dtypes(one.interface, session), profiles=one.profiles)
            )
        return Engine(
            graphs_by_width(parts) if len(parts) > 1 else tuple(parts),
            choice=merge_choices([choice for _, choice in chosen]),
            resources=resources.pop_all(),
            load_seconds=time.perf_counter() - started,
        )


def _with_session_dtypes(interface: Interface, session: Session) -> Interface:
    """Return `interface` with the element types that states have in `session`: of an engine in half precision, half."""
    kept = {name for state in interface.states for name in (state.input, state.output)}
    dtypes = {spec.name: spec.dtype for spec in (*session.inputs, *session.outputs) if spec.name in kept}
    return with_dtypes(interface, dtypes)


def _choose_graphs(manifest: Manifest, graph: str | None, backend: str | None) -> list[tuple[GraphRecord, EngineChoice]]:
    """Return what to load: one graph, or all where they are one decoder; one backend serves these, as they share states."""
    if graph is not None or not share_states(manifest.graphs):
        return [choose(manifest, graph, backend)]
    chosen = [choose(manifest, one.name, backend) for one in manifest.graphs]
    if len({choice.backend for _, choice in chosen}) > 1:
        chosen = [choose(manifest, one.name, "onnxruntime") for one in manifest.graphs]
    return chosen


def _kernel_cache_dir() -> Path:
    from ryzen_compile.artifacts.cache.store import default_folder

    return default_folder() / "kernels"
