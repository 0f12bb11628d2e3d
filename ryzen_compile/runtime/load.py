"""Loading packages: `load(path)` returns an `Engine`, and `engine.run(**inputs)` its outputs."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Unpack

import msgspec

from ryzen_compile import registry
from ryzen_compile.artifacts.package.read import read_package
from ryzen_compile.backends.input_validation import check_scalars, is_torch_tensor
from ryzen_compile.backends.traits import find_traits, portable_backend
from ryzen_compile.data.validation import check_shapes
from ryzen_compile.diagnostic import Diagnostic
from ryzen_compile.errors import RyzenError, ShapeError, UsageError
from ryzen_compile.processes.limits import available_memory_bytes, inherited_limits
from ryzen_compile.runtime.boundary_casts import with_boundary_casts
from ryzen_compile.runtime.choose import EngineChoice, choose, merge_choices
from ryzen_compile.runtime.generation.generate import GeneratedSequence, Generation, GenerationOptions, parse_options
from ryzen_compile.runtime.generation.session import DecodeSession
from ryzen_compile.runtime.generation.step_graphs import StepGraph, graphs_by_width, share_states
from ryzen_compile.runtime.generation.text_stream import TextStream
from ryzen_compile.spec import profile
from ryzen_compile.spec.interface import with_dtypes
from ryzen_compile.utils.closeable import Closeable
from ryzen_compile.utils.files import is_onnx_file, quoted_path
from ryzen_compile.utils.summarized import Summarized

if TYPE_CHECKING:
    from ryzen_compile.artifacts.package.manifest import GraphRecord, Manifest
    from ryzen_compile.artifacts.package.read import Package
    from ryzen_compile.backends.api import Session
    from ryzen_compile.spec.interface import Interface
    from ryzen_compile.spec.profile import Profile
    from ryzen_compile.spec.text_files import TextFiles
    from ryzen_compile.text.chat_template import Message
    from ryzen_compile.text.tokenizer import TextTokenizer

_TORCH_ONLY_DTYPES = frozenset({"bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"})
"""Element types that torch supports, but neither numpy nor numpy's DLPack export."""
_MAX_COPIED_SHARE = 0.25
"""The largest share of the available memory that copies of weights take by default, one for each step graph of a decoder."""
_MAX_CACHED_SHAPES = 1024
"""The maximum number of input shapes whose step graph an engine caches."""


class Engine(Summarized, Closeable):
    """A loaded graph of a package, or the loaded step graphs of one decoder.

    Thread-safe, but `close` does not wait for running calls. Use it as a context manager, or call `close`.
    """

    def __init__(
        self,
        step_graphs: tuple[StepGraph, ...],
        *,
        choice: EngineChoice,
        resources: ExitStack,
        load_seconds: float,
        load_tokenizer: Callable[[], TextTokenizer] | None = None,
        open_for_batches: Callable[[ExitStack], tuple[StepGraph, ...]] | None = None,
    ) -> None:
        self._step_graphs = step_graphs
        self._open_for_batches = open_for_batches
        self._batch_step_graphs: tuple[StepGraph, ...] | None = None
        self._resources = resources
        self.has_tokenizer = load_tokenizer is not None
        """Whether the package or ONNX file has a tokenizer, so that prompts may be texts."""
        self._load_tokenizer = load_tokenizer or _refuse_text
        self._lock = threading.Lock()
        self._closed = False
        self._graph_by_shapes: dict[tuple[tuple[str, tuple[int, ...]], ...], StepGraph] = {}
        self.choice = choice
        """The file and the backend that run the graph, and the reason."""
        self.interface = step_graphs[-1].interface
        """The inputs, outputs and states; for several step graphs those of the graph with the widest steps."""
        self.profiles = tuple(profile for step_graph in step_graphs for profile in step_graph.profiles)
        """The ranges of input shapes that the graph was compared at; an engine runs no others, a portable variant does."""
        sequence_inputs = {spec.name for spec in self.interface.inputs if "sequence(" in spec.dtype}
        self._shaped_inputs = tuple(
            dict.fromkeys(name for profile in self.profiles for name in profile.min if name not in sequence_inputs)
        )
        self.load_seconds = load_seconds
        """The load time in seconds, including digest checks and just-in-time compilation."""

    def run(self, /, *args: Any, **inputs: Any) -> dict[str, Any]:
        """Run once and return the outputs by name.

        Inputs are numpy arrays or torch tensors, by position in the order of the interface, by name, or in a mapping by name
        as the only position. If any input is a torch tensor, the outputs are torch tensors that share the memory of the
        result, in sequences too; values that torch has no element type for, such as strings, are returned unchanged. Raises
        ShapeError for an input name, element type or shape that does not match the interface, and for shapes outside every
        profile of an engine. A portable variant takes all shapes that its graph takes.
        """
        all_inputs = self._inputs_by_name(args, inputs)
        self._check_open()
        check_scalars(all_inputs, self.interface.inputs)
        outputs = self._select_step_graph(all_inputs).session.run(all_inputs)
        if any(is_torch_tensor(value) for value in all_inputs.values()):
            return {name: _to_torch(value) for name, value in outputs.items()}
        return dict(outputs)

    def _inputs_by_name(self, args: tuple[Any, ...], inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs of a call by name. Raises ShapeError for too many, and for one that is given twice."""
        if len(args) == 1 and (args[0] is None or isinstance(args[0], Mapping)):
            positional = dict(args[0] or {})
        else:
            names = [spec.name for spec in self.interface.inputs]
            if len(args) > len(names):
                raise ShapeError(
                    f"{len(args)} inputs are given by position, and the graph has {len(names)}: {', '.join(names)}",
                    hint="give each input once",
                )
            positional = dict(zip(names, args, strict=False))
        twice = next((name for name in positional if name in inputs), None)
        if twice is not None:
            raise ShapeError(f"the input `{twice}` is given by position and by name", hint="give it once")
        return {**positional, **inputs}

    def __call__(self, /, *args: Any, **inputs: Any) -> Any:
        """Run once and return the only output, or a tuple of all outputs in the order of the interface; see `run`."""
        outputs = self.run(*args, **inputs)
        values = tuple(outputs[spec.name] for spec in self.interface.outputs)
        return values[0] if len(values) == 1 else values

    def session(self, batch: int = 1) -> DecodeSession:
        """Open a decoding session of `batch` sequences, whose states stay on the device of the engine between steps.

        Raises RyzenError if the engine is not a decoder with fixed-size states, ShapeError if no profile supports `batch`.
        """
        self._check_open()
        return DecodeSession(*self._step_graphs_for(batch), batch=batch, owner=self)

    def _step_graphs_for(self, batch: int) -> tuple[StepGraph, ...]:
        """Return the step graphs for `batch` sequences. With mapped weights, products of a few rows are slow."""
        if batch == 1 or self._open_for_batches is None:
            return self._step_graphs
        with self._lock:
            if self._batch_step_graphs is None:
                self._batch_step_graphs = self._open_for_batches(self._resources)
            return self._batch_step_graphs

    @functools.cached_property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer of the package or ONNX file.

        Raises UsageError if there is none, PackageError or ModelError if its files are damaged.
        """
        return self._load_tokenizer()

    def generate(self, prompts: Any, **options: Unpack[GenerationOptions]) -> list[GeneratedSequence]:
        """Continue prompts and return the continuation of each, with its finish reason.

            (sequence,) = engine.generate("The capital of France is", max_new_tokens=32)

        `prompts` is a text, a list of texts, one sequence of ids, or several of any lengths; texts need the tokenizer of the
        package. `GenerationOptions` documents the options. Raises RyzenError if the engine is not a decoder with fixed-size
        states, ShapeError for prompts that the decoder does not support, UsageError for numbers out of range.
        """
        is_text = _is_text(prompts)
        sequences = self._generation(self._encode(prompts), options).collect()
        if not is_text:
            return sequences
        return [replace(sequence, text=self.tokenizer.decode(sequence.tokens)) for sequence in sequences]

    def stream(self, prompts: Any, **options: Unpack[GenerationOptions]) -> Iterator[tuple[int, int]]:
        """Generate as `generate` does, but yield each token when it is available, as (index of its sequence, id)."""
        return self._generation(self._encode(prompts), options).stream()

    def stream_text(self, prompt: str | Sequence[Message], **options: Unpack[GenerationOptions]) -> TextStream:
        """Continue one text, or reply to one conversation, and return the pieces of the new text as they become available.

        for piece in engine.stream_text("The capital of France is"):
            print(piece, end="", flush=True)
        """
        ids = self._encode(prompt) if isinstance(prompt, str) else self.tokenizer.encode_chat(prompt)
        return TextStream(self._generation(ids, options), self.tokenizer)

    def chat(self, messages: Sequence[Message], **options: Unpack[GenerationOptions]) -> GeneratedSequence:
        """Reply to a conversation, whose prompt the chat template of the package makes.

            reply = engine.chat([{"role": "user", "content": "What is the capital of France?"}]).text

        Raises UsageError if the package has no tokenizer or no chat template; otherwise raises as `generate` does.
        """
        (sequence,) = self._generation(self.tokenizer.encode_chat(messages), options).collect()
        return replace(sequence, text=self.tokenizer.decode(sequence.tokens))

    def _encode(self, prompts: Any) -> Any:
        """Return the ids of texts; other prompts are returned unchanged. Raises UsageError for a text without tokens."""
        if not _is_text(prompts):
            return prompts
        encoded = [self.tokenizer.encode(text) for text in ([prompts] if isinstance(prompts, str) else prompts)]
        if not all(ids.size for ids in encoded):
            raise UsageError(
                "the prompt is empty, and this tokenizer adds no token that begins a text", hint="give a prompt with a text"
            )
        return encoded[0] if isinstance(prompts, str) else encoded

    def _generation(self, ids: Any, options: GenerationOptions) -> Generation:
        self._check_open()
        sampling, limits, seed = parse_options(options, self._stop_ids)
        return Generation(self, ids, sampling=sampling, limits=limits, seed=seed)

    def _stop_ids(self) -> Collection[int]:
        return self.tokenizer.stop_ids if self.has_tokenizer else ()

    def close(self) -> None:
        """Free the resources of the engine; a second call has no effect."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._resources.close()

    @property
    def diagnostics(self) -> tuple[Diagnostic, ...]:
        """What was chosen and why, as information, and the criteria that it does not meet, as warnings."""
        message = f"{self.choice.summary}; loaded in {self.load_seconds:.2f} s"
        return (Diagnostic(code="engine-chosen", severity="info", message=message), *self.choice.warnings)

    @property
    def summary(self) -> str:
        """What runs, and by which backend."""
        return f"{self.choice.summary}{', closed' if self._closed else ''}"

    def _details(self) -> list[str]:
        interface = self.interface
        return [*(f"input {spec}" for spec in interface.inputs), *(f"output {spec}" for spec in interface.outputs)]

    def _check_open(self) -> None:
        if self._closed:
            raise RyzenError("this engine is closed", hint="load the package again")

    def _select_step_graph(self, inputs: Mapping[str, Any]) -> StepGraph:
        """Return the narrowest step graph that accepts the shapes of `inputs`. Raises ShapeError if none accepts them.

        Inputs that are missing or have no shape are ignored here; the session reports them.
        """
        shapes = {name: shape for name in self._shaped_inputs if (shape := _shape(inputs.get(name))) is not None}
        key = tuple(shapes.items())
        if key in self._graph_by_shapes:
            return self._graph_by_shapes[key]
        *narrower, widest = self._step_graphs
        selected = next((step_graph for step_graph in narrower if _accepts(step_graph, shapes)), widest)
        if selected is widest:
            _check_shapes(selected, shapes)
        if len(self._graph_by_shapes) < _MAX_CACHED_SHAPES:
            self._graph_by_shapes[key] = selected
        return selected


def _check_shapes(step_graph: StepGraph, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ShapeError unless `shapes` match the interface of `step_graph` and, if it is bounded, one of its profiles."""
    if all(spec.name in shapes for spec in step_graph.interface.inputs):
        check_shapes(step_graph.interface, shapes, source="this call")
    if step_graph.bounded:
        profile.select_profile((_restrict_profile(item, shapes) for item in step_graph.profiles), shapes)


def _accepts(step_graph: StepGraph, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    try:
        _check_shapes(step_graph, shapes)
    except ShapeError:
        return False
    return True


def _restrict_profile(full_profile: Profile, names: Container[str]) -> Profile:
    """Return the profile restricted to the inputs in `names`."""
    return msgspec.structs.replace(full_profile, min={name: shape for name, shape in full_profile.min.items() if name in names})


def _shape(value: Any) -> tuple[int, ...] | None:
    """Return the shape of an array, a list or a number; None for a value without a shape, such as a ragged list."""
    import numpy as np

    if value is None or (hasattr(value, "__dlpack__") and not hasattr(value, "shape")):
        return None
    try:
        return tuple(np.shape(value))
    except (RuntimeError, TypeError, ValueError):
        return None


def _to_torch(value: Any) -> Any:
    """Return an output as a torch tensor that shares its memory; a value that torch has no element type for is unchanged."""
    import numpy as np
    import torch

    if isinstance(value, list):
        return [_to_torch(item) for item in value]
    if isinstance(value, np.ndarray):
        if value.dtype.name in _TORCH_ONLY_DTYPES:
            return torch.from_dlpack(value.view(f"int{8 * value.dtype.itemsize}")).view(getattr(torch, value.dtype.name))
        if value.dtype.kind not in "biufc":
            return value
    return torch.from_dlpack(value) if hasattr(value, "__dlpack__") and not is_torch_tensor(value) else value


def load(
    path: str | os.PathLike[str],
    *,
    graph: str | None = None,
    variant: str | None = None,
    backend: str | None = None,
    cache: str | os.PathLike[str] | None = None,
    share_weights: bool | None = None,
) -> Engine:
    """Load a graph of the package at `path`: an engine that fits the GPU of this process, else the portable variant.

    `path` may also be an ONNX file, which the portable backend runs.

    `graph` may be omitted if the package contains one graph, or the step graphs of one decoder over the same states, as
    `rewrite --steps` writes them: the engine then runs each step on the narrowest graph that supports its width. `variant` is
    the name of a variant, or a beginning of it that no other variant has; only that variant is run. Without it, the default of
    each backend is run, which is its first variant. `backend` restricts the choice to one backend. `choose` documents which
    engine is chosen. `cache` is the folder for the kernels that TensorRT-RTX compiles on first load; by default it is in the
    user's cache folder.

    `share_weights` states whether the step graphs of a decoder on a CPU map the same weight files, or each copy them into the
    layout of the backend, in which they run faster. Without it, they copy them if that takes less than a quarter of the memory
    that is available.

    Digests are checked before any file is read. Raises PackageError for a damaged package or if nothing in
    it can run on this machine, UsageError for an unknown graph, variant or backend.
    """
    start_time = time.perf_counter()
    if backend is not None and backend not in registry.names("backends"):
        raise UsageError(f"there is no backend `{backend}`", hint=f"choose one of {', '.join(registry.names('backends'))}")
    if is_onnx_file(path):
        if graph is not None or variant is not None:
            raise UsageError(f"`{path}` is an ONNX file, which has one graph", hint="leave the graph and the variant out")
        return _load_onnx_file(Path(path), backend or portable_backend(), start_time)
    package = read_package(path)
    choices = _choose_graphs(package.manifest, graph, variant, backend)
    package.verify_digests(*(file for _, choice in choices for file in choice.files))
    cache_dir = Path(cache) if cache is not None else _kernel_cache_dir()
    open_graph = functools.partial(_open_step_graph, package, cache_dir=cache_dir, bounded=len(choices) > 1)
    if share_weights is None:
        share_weights = _copies_are_large(package, choices)
    maps_weights = share_weights and len(choices) > 1
    with ExitStack() as resources:
        opened = [open_graph(*item, resources, map_weights=maps_weights) for item in choices]
        step_graphs = graphs_by_width(opened) if len(opened) > 1 else tuple(opened)
        files = {id(step_graph): item for step_graph, item in zip(opened, choices, strict=True)}

        def open_for_batches(resources: ExitStack) -> tuple[StepGraph, ...]:
            *narrower, widest = step_graphs
            return (*(open_graph(*files[id(step_graph)], resources) for step_graph in narrower), widest)

        return Engine(
            step_graphs,
            choice=merge_choices([choice for _, choice in choices]),
            resources=resources.pop_all(),
            load_seconds=time.perf_counter() - start_time,
            load_tokenizer=functools.partial(_read_tokenizer, package) if package.manifest.text_files else None,
            open_for_batches=open_for_batches if maps_weights and _runs_portable_variants(choices) else None,
        )


def _copies_are_large(package: Package, choices: Sequence[tuple[GraphRecord, EngineChoice]]) -> bool:
    """Return whether copies of the weights for each graph take a large share of the memory that this process may use now."""
    limits = [limit for limit in (available_memory_bytes(), inherited_limits().memory_bytes) if limit is not None]
    if not limits:
        return True
    sizes = {file.path: file.size_bytes for file in package.manifest.files}
    copied_bytes = sum(sizes[path] for _, choice in choices for path in choice.files)
    return copied_bytes > _MAX_COPIED_SHARE * min(limits)


def _runs_portable_variants(choices: Sequence[tuple[GraphRecord, EngineChoice]]) -> bool:
    return all(choice.backend == portable_backend() for _, choice in choices)


def _open_step_graph(
    package: Package,
    record: GraphRecord,
    choice: EngineChoice,
    resources: ExitStack,
    *,
    cache_dir: Path,
    bounded: bool,
    map_weights: bool = False,
) -> StepGraph:
    """Open the chosen file of a graph until `resources` are closed; `map_weights` is as for `Backend.open`."""
    traits = find_traits(choice.backend)
    path = str(Path(package.path, choice.path))
    opened = registry.find_backend(choice.backend).open(path, cache_dir=str(cache_dir), map_weights=map_weights)
    session = with_boundary_casts(resources.enter_context(opened), record.interface, traits.demoted_dtypes)
    return StepGraph(
        session=session,
        interface=_with_session_dtypes(record.interface, session),
        profiles=record.profiles,
        bounded=bounded or traits.compiles,
    )


def _load_onnx_file(path: Path, backend: str, start_time: float) -> Engine:
    """Load an ONNX file that is not part of a package; its shapes are not bounded."""
    from ryzen_compile.ir.interface_metadata import interface_of
    from ryzen_compile.ir.load import load as load_graph
    from ryzen_compile.ir.text_files import recorded_text_files

    model = load_graph(path)
    interface, text_files = interface_of(model), recorded_text_files(model)
    with ExitStack() as resources:
        session = resources.enter_context(registry.find_backend(backend).open(str(path)))
        step_graph = StepGraph(
            session=session, interface=interface, profiles=(profile.derive_profile(interface),), bounded=False
        )
        choice = EngineChoice(
            backend=backend, path=str(path), files=(str(path),), summary=f"{path.name} by {backend}", not_chosen=()
        )
        return Engine(
            (step_graph,),
            choice=choice,
            resources=resources.pop_all(),
            load_seconds=time.perf_counter() - start_time,
            load_tokenizer=None if text_files is None else functools.partial(_read_recorded_tokenizer, text_files, path),
        )


def _read_recorded_tokenizer(record: TextFiles, path: Path) -> TextTokenizer:
    from ryzen_compile.ir.text_files import read_recorded_files
    from ryzen_compile.text.tokenizer import TextTokenizer

    return TextTokenizer(read_recorded_files(record, path), source=quoted_path(path))


def _read_tokenizer(package: Package) -> TextTokenizer:
    from ryzen_compile.text.tokenizer import TextTokenizer

    files = {Path(path).name: package.read_bytes(path) for path in package.manifest.text_files}
    return TextTokenizer(files, source=quoted_path(package.path))


def _refuse_text() -> NoReturn:
    raise UsageError(
        "this model has no tokenizer, so it takes ids and not text",
        hint="export it from a Hugging Face folder with tokenizer.json, hf:FOLDER, and build it again",
    )


def _is_text(prompts: Any) -> bool:
    """Return whether `prompts` is a text or a list of texts."""
    return isinstance(prompts, str) or (isinstance(prompts, (list, tuple)) and bool(prompts) and isinstance(prompts[0], str))


def _with_session_dtypes(interface: Interface, session: Session) -> Interface:
    """Return `interface` with the state element types of `session`, such as float16 for an engine in half precision."""
    state_tensors = {name for state in interface.states for name in (state.input, state.output)}
    dtypes = {spec.name: spec.dtype for spec in (*session.inputs, *session.outputs) if spec.name in state_tensors}
    return with_dtypes(interface, dtypes)


def _choose_graphs(
    manifest: Manifest, graph: str | None, variant: str | None, backend: str | None
) -> list[tuple[GraphRecord, EngineChoice]]:
    """Return the graphs to load with their files: one graph, or the step graphs of one decoder.

    Step graphs share their states and therefore run on one backend.
    """
    if graph is not None or not share_states(manifest.graphs):
        return [choose(manifest, graph, variant, backend)]
    choices = [choose(manifest, record.name, variant, backend) for record in manifest.graphs]
    if len({choice.backend for _, choice in choices}) > 1:
        choices = [choose(manifest, record.name, variant, portable_backend()) for record in manifest.graphs]
    return choices


def _kernel_cache_dir() -> Path:
    from ryzen_compile.artifacts.cache.store import default_folder

    return default_folder() / "kernels"
