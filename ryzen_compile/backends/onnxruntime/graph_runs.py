"""Runs of an ONNX file on samples in a child process; a run that crashes, hangs or exhausts the memory is an error."""

from __future__ import annotations

import importlib
import itertools
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import msgspec

from ryzen_compile.backends.onnxruntime.backend import OnnxRuntime
from ryzen_compile.errors import BackendError, RyzenError
from ryzen_compile.processes.child_call import call_in_child
from ryzen_compile.processes.operation import performing
from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.spec.profile import format_shape
from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    import numpy as np

    from ryzen_compile.processes.limits import ResourceLimits
    from ryzen_compile.progress import Progress
    from ryzen_compile.spec.interface import Inputs, Outputs


_MIN_MAPPED_BYTES = 1 << 20
"""Larger arrays are mapped from a file of their own."""


class GraphRun(Record, frozen=True):
    """The run of a graph on one sample."""

    error: str | None = None
    """Why the run failed; None: it succeeded."""
    folder: str = ""
    """The folder of the outputs."""

    def outputs(self) -> Outputs:
        """Return the outputs by name, mapped from their files. Raises BackendError if the run failed."""
        if self.error is not None:
            raise BackendError(self.error)
        return load_arrays(Path(self.folder))


@runtime_checkable
class RemoteSamples(Protocol):
    """Samples that a model computes: they are made in the child process, one at a time."""

    def remote_call(self) -> tuple[str, bytes]:
        """Return a function, `module:name`, and its argument as JSON, with which it returns the samples."""
        ...


@contextmanager
def graph_runs(
    graph: Path,
    samples: Iterable[Inputs],
    *,
    keep_outputs: bool = True,
    optimized: bool = True,
    limits: ResourceLimits | None = None,
    progress: Progress | None = None,
) -> Iterator[Sequence[GraphRun]]:
    """Run the ONNX file `graph` on each of `samples` in a child process, and yield the runs in the order of the samples.

    Inputs that the graph does not have are ignored. The outputs are readable until the block ends; without `keep_outputs` they
    are discarded. `optimized` is as in `OnnxRuntime`. A sample on which ONNX Runtime reports an error does not prevent the
    others.

    Raises BackendError if ONNX Runtime cannot load the graph, or if the child process crashed or exceeded a limit; the message
    names the shapes.
    """
    with tempfile.TemporaryDirectory(prefix="ryzen-compile-") as folder:
        if isinstance(samples, RemoteSamples):
            function, argument = samples.remote_call()
        else:
            for index, sample in enumerate(samples):
                save_arrays(sample, Path(folder, f"sample-{index}"))
            function, argument = f"{__name__}:{_load_samples.__name__}", msgspec.json.encode(folder)
        call = _RunCall(
            graph=str(graph.absolute()),
            samples_function=function,
            samples_argument=msgspec.Raw(argument),
            output_folder=folder,
            keep_outputs=keep_outputs,
            optimized=optimized,
        )
        encoded = call_in_child(
            f"{__name__}:{_run_encoded.__name__}",
            msgspec.json.encode(call),
            label=f"run of {graph.name}",
            preload=(__name__, "onnxruntime"),
            limits=limits,
            progress=progress,
        )
        yield msgspec.json.decode(encoded, type=tuple[GraphRun, ...])


class _RunCall(Record, frozen=True):
    """The arguments of `graph_runs` for a child process."""

    graph: str
    samples_function: str
    samples_argument: msgspec.Raw
    output_folder: str
    """The folder in which each run gets a folder for its outputs."""
    keep_outputs: bool
    optimized: bool


def _run_encoded(argument: bytes, progress: Progress) -> bytes:
    """Perform an encoded `_RunCall` and return the encoded runs; the function that the child process calls."""
    call = msgspec.json.decode(argument, type=_RunCall)
    runs = []
    name = Path(call.graph).name
    runtime = OnnxRuntime(device="cpu", low_memory=True, optimized=call.optimized)
    with performing(f"loading {name}"), runtime.open(call.graph) as session:
        input_names = {spec.name for spec in session.inputs}
        module, _, function = call.samples_function.partition(":")
        samples: Iterable[Inputs] = getattr(importlib.import_module(module), function)(bytes(call.samples_argument))
        for index, sample in enumerate(samples):
            inputs = {name: array for name, array in sample.items() if name in input_names}
            shapes = ", ".join(f"{name} {format_shape(array.shape)}" for name, array in inputs.items())
            try:
                with performing(f"running {name} on {shapes}"):
                    outputs = session.run(inputs)
            except RyzenError as error:
                runs.append(GraphRun(error=error.message))
                continue
            folder = Path(call.output_folder, f"outputs-{index}")
            if call.keep_outputs:
                save_arrays(outputs, folder)
            runs.append(GraphRun(folder=str(folder)))
    return msgspec.json.encode(runs)


def _load_samples(argument: bytes) -> Iterator[Inputs]:
    """Yield the samples in the folders `sample-0`, `sample-1`, ... of a folder; the argument is its path."""
    folder = Path(msgspec.json.decode(argument, type=str))
    for index in itertools.count():
        path = folder / f"sample-{index}"
        if not path.is_dir():
            return
        yield load_arrays(path)


class _ArrayFile(Record, frozen=True):
    """An array in a folder of arrays."""

    name: str
    dtype: str
    """The name of the element type; NumPy's files do not record those of ml_dtypes."""


def save_arrays(arrays: Inputs | Outputs, folder: Path) -> None:
    """Write arrays by name to the new folder `folder`. Raises RyzenError for a value that is not an array."""
    import numpy as np

    folder.mkdir()
    files, small = [], {}
    for index, (name, value) in enumerate(arrays.items()):
        if isinstance(value, (list, tuple)):
            raise RyzenError(f"`{name}` is a sequence, and only tensors are supported", hint="let the model return tensors")
        array = np.asarray(value)
        is_text = array.dtype.kind in "OUS"
        files.append(_ArrayFile(name=name, dtype="str" if is_text else array.dtype.name))
        if is_text:
            array = array.astype(np.str_)
        elif array.dtype.kind == "V":  # a type of ml_dtypes
            array = array.view(f"u{array.dtype.itemsize}")
        if array.nbytes < _MIN_MAPPED_BYTES:
            small[str(index)] = array
        else:
            np.save(folder / f"{index}.npy", array, allow_pickle=False)
    np.savez(folder / "small.npz", allow_pickle=False, **small)
    (folder / "names.json").write_bytes(msgspec.json.encode(files))


def load_arrays(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return the arrays that `save_arrays` wrote, by name; large ones are mapped from their files."""
    import numpy as np

    files = msgspec.json.decode((folder / "names.json").read_bytes(), type=list[_ArrayFile])
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    with np.load(folder / "small.npz", allow_pickle=False) as small:
        for index, file in enumerate(files):
            if str(index) in small:
                array = small[str(index)]
            else:  # a mapping keeps its file open, so that only few arrays are mapped
                array = np.asarray(np.load(folder / f"{index}.npy", mmap_mode="c", allow_pickle=False))
            arrays[file.name] = array.astype(object) if file.dtype == "str" else array.view(numpy_dtype(file.dtype))
    return arrays
