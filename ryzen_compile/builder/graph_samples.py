"""Samples of a graph: as given, or the steps of a decoder with fixed-size states over streams of tokens.

The step graphs of one decoder take different inputs, and their states exist only while it decodes. So one set of token streams
serves all of them: each graph decodes the streams, and its samples are the inputs of its steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import msgspec

from ryzen_compile import registry
from ryzen_compile.backends.traits import portable_backend
from ryzen_compile.data.documents import documents_from_samples
from ryzen_compile.data.loading import load_samples
from ryzen_compile.data.npz import open_npz
from ryzen_compile.errors import RyzenError
from ryzen_compile.runtime.generation.decoder_spec import DecoderSpec, make_decoder_spec
from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.spec.interface import Inputs, Interface
from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    import numpy as np

    from ryzen_compile.spec.profile import Profile

STEP_TOKENS = 256
"""The maximum number of tokens of a row: large activations of language models occur at few tokens."""
MAX_STEPS, MAX_STREAMS = 64, 8
"""The maximum numbers of steps, and of streams that they are taken from."""
_MAX_READ_BYTES = 1 << 32
"""The maximum size of the states of all steps together, which bounds the time that they take."""
MAX_KEPT_BYTES = 1 << 29
"""The maximum size of all samples in memory, if they are kept; of the steps of a decoder, that of their states."""


class DecoderSteps(Sequence[Inputs]):
    """The inputs of steps of a decoder over token streams; each iteration decodes again, so that one step is in memory."""

    def __init__(
        self, graph: Path, decoder: DecoderSpec, streams: Sequence[np.ndarray[Any, Any]], *, width: int, count: int
    ) -> None:
        """Decode `streams` of token ids, (tokens,) each, in steps of `width` tokens, at most `count` of them."""
        self._graph, self._decoder, self._width = graph, decoder, width
        self.state_bytes = _state_bytes(decoder)
        """The size of the states of one step."""
        self._streams = [stream[: decoder.capacity] for stream in streams if len(stream[: decoder.capacity]) >= width]
        if not self._streams:
            raise RyzenError(
                f"no stream of tokens has the {width} tokens of a step of `{graph.name}`",
                hint="give longer streams: ids of shape (streams, tokens)",
            )
        self._count = count
        per_stream = math.ceil(count / len(self._streams))
        self._counts = [min(len(stream) // width, per_stream) for stream in self._streams]

    def __len__(self) -> int:
        return sum(self._counts)

    def __iter__(self) -> Iterator[Inputs]:
        import numpy as np

        decoder, width = self._decoder, self._width
        with registry.find_backend(portable_backend()).open(str(self._graph), map_weights=True) as session:
            binding = session.bind_states(decoder.states, decoder.state_shapes(1))
            try:
                for stream, count in zip(self._streams, self._counts, strict=True):
                    binding.reset([0])
                    for start in range(0, count * width, width):
                        inputs = {decoder.ids.name: stream[None, start : start + width].astype(numpy_dtype(decoder.ids.dtype))}
                        if decoder.mask is not None:
                            inputs[decoder.mask.name] = np.ones((1, width), numpy_dtype(decoder.mask.dtype))
                        yield inputs | {state.input: binding.read(state.name) for state in decoder.states}
                        binding.run(inputs)
            finally:
                binding.close()

    def remote_call(self) -> tuple[str, bytes]:
        """Return how a child process makes the same steps; see `RemoteSamples`."""
        call = _StepsCall(
            graph=str(self._graph.absolute()),
            decoder=self._decoder,
            streams=[stream.tolist() for stream in self._streams],
            width=self._width,
            count=self._count,
        )
        return f"{__name__}:{open_steps.__name__}", msgspec.json.encode(call)

    @overload
    def __getitem__(self, index: int) -> Inputs: ...

    @overload
    def __getitem__(self, index: slice) -> list[Inputs]: ...

    def __getitem__(self, index: int | slice) -> Inputs | list[Inputs]:
        if isinstance(index, slice):
            return list(self)[index]
        return next(itertools.islice(self, range(len(self))[index], None))


class _StepsCall(Record, frozen=True):
    """The steps of a decoder, for a child process."""

    graph: str
    decoder: DecoderSpec
    streams: list[list[int]]
    width: int
    count: int


def open_steps(argument: bytes) -> DecoderSteps:
    """Return the steps of an encoded `_StepsCall`."""
    import numpy as np

    call = msgspec.json.decode(argument, type=_StepsCall)
    streams = [np.array(stream, np.int64) for stream in call.streams]
    return DecoderSteps(Path(call.graph), call.decoder, streams, width=call.width, count=call.count)


def graph_samples(data: str, interface: Interface, profile: Profile, graph: Path, *, seed: int) -> Sequence[Inputs]:
    """Return the samples that `data` names for the graph in the file `graph`, with `interface` and `profile`.

    For a decoder with fixed-size states, `data` may hold token ids only, of shape (streams, tokens) by the name of its ids
    input, or name a recipe with documents. Otherwise the samples hold every input. Raises the errors of reading the samples.
    """
    decoder = _decoder(interface)
    streams = None if decoder is None else _streams(data, interface, decoder, seed)
    steps = None if streams is None else decoder_steps(interface, profile, graph, itertools.islice(streams, MAX_STREAMS))
    return list(load_samples(data, interface, seed=seed)) if steps is None else steps


def decoder_steps(
    interface: Interface, profile: Profile, graph: Path, streams: Iterable[np.ndarray[Any, Any]]
) -> DecoderSteps | None:
    """Return the steps over `streams`, token ids of shape (tokens,) each; None if the graph is no decoder of fixed-size states.

    Steps have up to 256 tokens, as far as `profile` and the streams allow, and there are 2 to 64 of them, whose states take at
    most 4 GB together. Raises RyzenError if no stream is as long as the shortest step of `profile`.
    """
    decoder = _decoder(interface)
    if decoder is None:
        return None
    tokens = list(streams)
    low, high = (shapes[decoder.ids.name][1] for shapes in (profile.min, profile.max))
    longest = max((len(stream[: decoder.capacity]) for stream in tokens), default=0)
    width = min(max(min(STEP_TOKENS, longest), low), high)
    count = max(2, min(MAX_STEPS, 2 * STEP_TOKENS // width, _MAX_READ_BYTES // max(_state_bytes(decoder), 1)))
    return DecoderSteps(graph, decoder, tokens, width=width, count=count)


def _state_bytes(decoder: DecoderSpec) -> int:
    """Return the size of the states of one sequence."""
    return sum(
        math.prod(shape) * numpy_dtype(decoder.state_dtypes[name]).itemsize for name, shape in decoder.state_shapes(1).items()
    )


def _decoder(interface: Interface) -> DecoderSpec | None:
    try:
        return make_decoder_spec(interface)
    except RyzenError:
        return None


def kept_samples(samples: Sequence[Inputs]) -> list[Inputs]:
    """Return `samples` in memory: all of a list, and of the steps of a decoder, evenly spread, at most 512 MB."""
    if not isinstance(samples, DecoderSteps):
        return list(samples)
    count = max(1, min(len(samples), MAX_KEPT_BYTES // max(samples.state_bytes, 1)))
    kept = {index * len(samples) // count for index in range(count)}
    return [sample for index, sample in enumerate(samples) if index in kept]


def _streams(data: str, interface: Interface, decoder: DecoderSpec, seed: int) -> Iterable[np.ndarray[Any, Any]] | None:
    """Return the token streams that `data` holds; None if it holds samples of every input."""
    if registry.is_recipe_reference(data):
        recipe = registry.find_recipe(data)
        if recipe.evaluation is None or {spec.name for spec in recipe.interface.inputs} == {
            spec.name for spec in interface.inputs
        }:
            return None
        return (recipe.evaluation.calibration or recipe.evaluation.documents)(seed)
    files = sorted(Path(data).glob("*.npz")) if Path(data).is_dir() else [Path(data)]
    if not files or files[0].suffix != ".npz" or not files[0].is_file():
        return None
    with open_npz(files[0]) as archive:
        if set(archive.headers) != {decoder.ids.name}:
            return None
    return documents_from_samples(data, decoder.ids)(seed)
