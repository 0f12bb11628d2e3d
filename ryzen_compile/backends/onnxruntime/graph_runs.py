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
from ryzen_compile.data.array_files import dtype_name, map_array, restored, storable, write_array
from ryzen_compile.errors import BackendError, RyzenError
from ryzen_compile.processes.child_call import call_in_child
from ryzen_compile.processes.operation import performing
from ryzen_compile.progress import StageItems, counted
from ryzen_compile.spec.profile import format_shapes
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
    sum_outputs: bool = False,
    optimized: bool = True,
    map_weights: bool = False,
    limits: ResourceLimits | None = None,
    progress: Progress | None = None,
    title: str | None = None,
) -> Iterator[Sequence[GraphRun]]:
    """Run the ONNX file `graph` on each of `samples` in a child process, and yield the runs in the order of the samples.

    Inputs that the graph does not have are ignored. The outputs are readable until the block ends. With `sum_outputs`, the
    only run is one whose outputs are the sums over all samples in float64, or else the first that failed. `optimized` and
    `map_weights` are as in `OnnxRuntime`. A sample on which ONNX Runtime reports an error does not prevent the others. `title`
    is that of the stage whose items are the samples; None: the graph is run.

    Raises BackendError if ONNX Runtime cannot load the graph, or if the child process crashed or exceeded a limit; the message
    names the shapes.
    """
    with tempfile.TemporaryDirectory(prefix="ryzen-compile-") as folder:
        count = None
        if isinstance(samples, RemoteSamples):
            function, argument = samples.remote_call()
        else:
            count = 0
            for sample in samples:
                save_arrays(sample, Path(folder, f"sample-{count}"))
                count += 1
            function, argument = f"{__name__}:{_load_samples.__name__}", msgspec.json.encode(folder)
        call = _RunCall(
            graph=str(graph.absolute()),
            samples_function=function,
            samples_argument=msgspec.Raw(argument),
            sample_count=count,
            title=title or f"run {graph.name}",
            output_folder=folder,
            sum_outputs=sum_outputs,
            optimized=optimized,
            map_weights=map_weights,
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
    sample_count: int | None
    """None: it is not known before the samples are made."""
    title: str
    output_folder: str
    """The folder in which each run gets a folder for its outputs."""
    sum_outputs: bool
    optimized: bool
    map_weights: bool


def _run_encoded(argument: bytes, progress: Progress) -> bytes:
    """Perform an encoded `_RunCall` and return the encoded runs; the function that the child process calls."""
    import numpy as np

    call = msgspec.json.decode(argument, type=_RunCall)
    runs: list[GraphRun] = []
    sums: dict[str, np.ndarray[Any, Any]] = {}
    name = Path(call.graph).name
    runtime = OnnxRuntime(device="cpu", low_memory=True, optimized=call.optimized, map_weights=call.map_weights)
    with performing(f"loading {name}"), runtime.open(call.graph) as session:
        input_names = {spec.name for spec in session.inputs}
        module, _, function = call.samples_function.partition(":")
        samples: Iterable[Inputs] = getattr(importlib.import_module(module), function)(bytes(call.samples_argument))
        with progress.stage(call.title, StageItems("samples", call.sample_count)) as stage:
            for index, sample in enumerate(counted(samples, stage)):
                inputs = {name: array for name, array in sample.items() if name in input_names}
                folder = Path(call.output_folder, f"outputs-{index}")
                with performing(f"running {name}, on {format_shapes(inputs)}"):
                    try:
                        outputs = session.run(inputs)
                    except RyzenError as error:
                        runs.append(GraphRun(error=error.message))
                        continue
                if not call.sum_outputs:
                    save_arrays(outputs, folder)
                else:
                    for name, array in outputs.items():
                        sums[name] = sums[name] + array if name in sums else array.astype(np.float64)
                runs.append(GraphRun(folder=str(folder)))
    if call.sum_outputs:
        folder = Path(call.output_folder, "sums")
        save_arrays(sums, folder)
        runs = [run for run in runs if run.error is not None][:1] or [GraphRun(folder=str(folder))]
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
        files.append(_ArrayFile(name=name, dtype=dtype_name(array)))
        if array.nbytes < _MIN_MAPPED_BYTES:
            small[str(index)] = storable(array)
        else:
            write_array(array, folder / f"{index}.npy")
    np.savez(folder / "small.npz", allow_pickle=False, **small)
    (folder / "names.json").write_bytes(msgspec.json.encode(files))


def load_arrays(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return the arrays that `save_arrays` wrote, by name; large ones are mapped from their files."""
    import numpy as np

    files = msgspec.json.decode((folder / "names.json").read_bytes(), type=list[_ArrayFile])
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    with np.load(folder / "small.npz", allow_pickle=False) as small:
        for index, file in enumerate(files):
            # A mapped array keeps its file open, so that only large ones are mapped.
            is_small = str(index) in small
            arrays[file.name] = (
                restored(small[str(index)], file.dtype) if is_small else map_array(folder / f"{index}.npy", file.dtype)
            )
    return arrays
