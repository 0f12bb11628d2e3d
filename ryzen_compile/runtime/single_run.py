"""One run of a package or an ONNX file in a child process, with a summary of its outputs."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ryzen_compile.data.loading import load_samples
from ryzen_compile.data.random_inputs import random_inputs, random_inputs_hint
from ryzen_compile.data.sequences import flatten_sequences
from ryzen_compile.errors import RyzenError, UsageError, default_hint
from ryzen_compile.processes.child_call import call_in_child
from ryzen_compile.processes.operation import performing
from ryzen_compile.progress import Progress
from ryzen_compile.runtime.requested_engine import requested_engine
from ryzen_compile.spec import profile
from ryzen_compile.utils.atomic_file import atomic_path, remove_stale_files
from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    import numpy as np

    from ryzen_compile.processes.limits import ResourceLimits
    from ryzen_compile.runtime.load import Engine
    from ryzen_compile.spec.interface import Inputs, Outputs


class RunRequest(Record, frozen=True):
    """What to run, and on what."""

    package: str
    """A package, with #GRAPH and @VARIANT, or an ONNX file."""
    graph: str | None = None
    variant: str | None = None
    backend: str | None = None
    texts: tuple[str, ...] = ()
    """The rows of the inputs, for a package with a tokenizer; empty: `data`, or random values."""
    data: str | None = None
    """Samples, of which the first is used; None: random values."""
    shapes: str | None = None
    """The shapes of random values; None: the opt shapes."""
    seed: int = 0
    save_inputs: str | None = None
    """The .npz file to write the inputs to."""
    save_outputs: str | None = None


class OutputSummary(Record, frozen=True, omit_defaults=True):
    """The values of one output."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    first: tuple[str, ...] | None = None
    """The first elements, of an output of strings or without elements."""
    min: float | None = None
    mean: float | None = None
    max: float | None = None
    not_finite: int | None = None
    """The number of NaNs and infinities, which the other values do not cover."""


class RunResult(Record, frozen=True):
    """What ran, and its outputs."""

    choice: str
    """The graph or engine that was chosen, and why."""
    outputs: tuple[OutputSummary, ...]


def run_once(request: RunRequest, *, limits: ResourceLimits | None = None, progress: Progress | None = None) -> RunResult:
    """Run a package or an ONNX file once in a child process.

    What runs, and whether it misses its criteria, is reported to `progress`. Raises the errors of loading and running it,
    RyzenError if a file cannot be written, and BackendError if the child process crashed or exceeded a limit.
    """
    try:
        encoded = call_in_child(
            f"{__name__}:{_run_encoded.__name__}",
            msgspec.json.encode(request),
            label=f"run of {request.package}",
            preload=(__name__,),
            limits=limits,
            progress=progress,
        )
    except BaseException:
        for file in (request.save_inputs, request.save_outputs):
            if file is not None:
                remove_stale_files(Path(file))
        raise
    return msgspec.json.decode(encoded, type=RunResult)


def _run_encoded(argument: bytes, progress: Progress) -> bytes:
    """Perform an encoded `RunRequest` and return an encoded `RunResult`; the function that the child process calls."""
    request = msgspec.json.decode(argument, type=RunRequest)
    with requested_engine(
        request.package, graph=request.graph, variant=request.variant, backend=request.backend, progress=progress
    ) as (engine, name):
        inputs = make_inputs(engine, request)
        is_random = not request.texts and request.data is None
        advice = default_hint(random_inputs_hint(engine.interface, inputs)) if is_random else nullcontext()
        with performing(f"running {name}, on {profile.format_shapes(inputs)}"), advice:
            outputs = flatten_sequences(engine.run(inputs))
    for file, arrays in ((request.save_inputs, inputs), (request.save_outputs, outputs)):
        if file:
            _save(file, arrays)
    summaries = tuple(summarize(name, array) for name, array in outputs.items())
    return msgspec.json.encode(RunResult(choice=engine.choice.summary, outputs=summaries))


def make_inputs(engine: Engine, request: RunRequest) -> Inputs:
    """Return inputs for a loaded engine: those of the texts, the first sample of the data, or random values of the shapes."""
    if request.texts:
        return _encode_texts(engine, request)
    if request.data is not None:
        return dict(next(iter(load_samples(request.data, engine.interface, seed=request.seed))))
    return random_inputs(engine.interface, engine.profiles, shapes=request.shapes, seed=request.seed)


def _encode_texts(engine: Engine, request: RunRequest) -> Inputs:
    """Return the texts as inputs, one a row, cut to the largest length of the engine. Raises UsageError if it takes others."""
    specs = engine.interface.inputs
    encoded = engine.tokenizer.encode_batch(request.texts, max_tokens=sys.maxsize)
    others = [spec.name for spec in specs if spec.name not in encoded]
    if others:
        generates = any(spec.name in encoded for spec in specs) and engine.interface.states
        raise UsageError(
            f"the inputs of `{request.package}` are not made of a text alone: it takes `{others[0]}` too",
            hint=f'ryzen-compile generate {request.package} "PROMPT"' if generates else "give inputs with --data FILE.npz",
        )
    longest = max(one.max[spec.name][-1] for one in engine.profiles for spec in specs)
    return {spec.name: encoded[spec.name][:, :longest].astype(spec.dtype) for spec in specs}


def _save(file: str, arrays: Inputs | Outputs) -> None:
    import numpy as np

    try:
        with atomic_path(Path(file)) as temporary, open(temporary, "wb") as stream:
            np.savez(stream, **arrays)
    except OSError as error:
        raise RyzenError(f"`{file}` cannot be written: {error.strerror}", hint="choose another file") from error


def summarize(name: str, array: np.ndarray[Any, Any]) -> OutputSummary:
    """Return the summary of an output."""
    import numpy as np

    values = np.asarray(array)
    dtype, shape = str(values.dtype), tuple(values.shape)
    if values.dtype.kind in "OUS" or not values.size:
        return OutputSummary(name=name, dtype=dtype, shape=shape, first=tuple(str(value) for value in values.ravel()[:4]))
    as_float64 = values.astype(np.float64)
    finite = as_float64[np.isfinite(as_float64)]
    summary = OutputSummary(name=name, dtype=dtype, shape=shape, not_finite=int(as_float64.size - finite.size))
    if not finite.size:
        return summary
    return msgspec.structs.replace(summary, min=float(finite.min()), mean=float(finite.mean()), max=float(finite.max()))
