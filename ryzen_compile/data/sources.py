"""Sources of samples: files, scripts and recipes. All samples are validated against an interface."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ryzen_compile.data.validation import validate_inputs
from ryzen_compile.errors import RyzenError, ShapeError, UsageError
from ryzen_compile.spec.interface import Inputs, Interface
from ryzen_compile.utils.user_script import call_user_function, describe_error, load_callable

if TYPE_CHECKING:
    from ryzen_compile.spec.recipe import Recipe

Array = np.ndarray[Any, Any]

_ZIP_MAGIC = b"PK"
"""The first bytes of every .npz file; numpy reads any other file as a pickle."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Samples that match an interface, read one at a time, again for each iteration."""

    description: str
    """The source: `recipe minilm, seed 0`, `sentences.npz`."""
    interface: Interface
    read: Callable[[], Iterable[tuple[str, Mapping[str, Any]]]]
    """Yields each raw sample with its name for error messages."""

    def __iter__(self) -> Iterator[Inputs]:
        """Yield the samples; raises ShapeError for a sample that does not match the interface, or if there are no samples."""
        count = 0
        for source, sample in self.read():
            count += 1
            yield validate_inputs(sample, self.interface, source=source)
        if not count:
            raise ShapeError(f"{self.description} contains no samples", hint="provide at least one sample")


def from_recipe(recipe: Recipe, *, seed: int) -> Samples:
    """Return the samples of a recipe for `seed`."""
    description = f"recipe {recipe.name}, seed {seed}"
    return Samples(
        description=description,
        interface=recipe.interface,
        read=lambda: ((f"{description}, sample {index}", sample) for index, sample in enumerate(recipe.samples(seed))),
    )


def from_npz(path: str | Path, interface: Interface) -> Samples:
    """Return the samples of an .npz file, or of all .npz files of a folder in the order of their names.

    Array names are input names. A file is one sample if its arrays have the ranks of the inputs. It is several samples if all
    arrays have one additional leading axis of the same size, or if the inputs have a fixed batch size and all arrays hold the
    same multiple of it. Pickled objects are rejected.

    Raises:
        RyzenError: The file or folder does not exist, or the folder has no .npz files.
    """
    root = Path(path)
    files = sorted(root.glob("*.npz")) if root.is_dir() else [root]
    if not files:
        raise RyzenError(f"folder `{root}` contains no .npz files", hint="give an .npz file, or a folder of .npz files")
    for file in files:
        if not file.is_file():
            raise RyzenError(f"there is no file `{file}`", hint="give an .npz file, or a folder of .npz files")

    def read() -> Iterator[tuple[str, Mapping[str, Any]]]:
        for file in files:
            samples = _split_samples(_load_npz(file), interface)
            for index, sample in enumerate(samples):
                yield (f"`{file}`" if len(samples) == 1 else f"`{file}`, sample {index}"), sample

    return Samples(description=f"`{root}`", interface=interface, read=read)


def from_script(text: str, interface: Interface) -> Samples:
    """Return the samples of a data loader script `file.py[:function]`, in the format of Polygraphy's `--data-loader-script`.

    The function, by default `load_data`, returns or yields dicts of arrays by input name.
    """
    function = load_callable(text, default="load_data")

    def read() -> Iterator[tuple[str, Mapping[str, Any]]]:
        result = call_user_function(text, function)
        if isinstance(result, Mapping) or not isinstance(result, Iterable):
            raise RyzenError(
                f"`{text}` must return a sequence of samples (got {type(result).__name__})",
                hint='yield {"input name": array, ...} for each sample',
            )
        samples, index = iter(result), -1
        while (sample := call_user_function(text, lambda: next(samples, None))) is not None:
            index += 1
            if not isinstance(sample, Mapping):
                raise RyzenError(
                    f"`{text}`: sample {index} must be a dict (got {type(sample).__name__})",
                    hint='yield {"input name": array, ...}',
                )
            yield f"`{text}`, sample {index}", sample

    return Samples(description=f"`{text}`", interface=interface, read=read)


def _load_npz(file: Path) -> dict[str, Array]:
    try:
        with open(file, "rb") as stream:
            if stream.read(2) != _ZIP_MAGIC:
                raise UsageError(f"`{file}` is not an .npz archive", hint="write it with numpy.savez(path, input_name=array)")
            stream.seek(0)
            archive = np.load(stream, allow_pickle=False)
            return {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, ValueError) and "pickle" in str(error):
            raise UsageError(
                f"`{file}` contains pickled objects, which are rejected because unpickling can execute code",
                hint="save arrays of numbers or strings",
            ) from None
        raise UsageError(f"`{file}` cannot be read as .npz: {describe_error(error)}") from error


def _split_samples(arrays: dict[str, Array], interface: Interface) -> list[dict[str, Array]]:
    """Return the samples in one file."""
    dims = {spec.name: spec.dims for spec in interface.inputs}
    input_arrays = {name: array for name, array in arrays.items() if dims.get(name) is not None}
    if not arrays or len(input_arrays) != len(arrays):
        return [arrays]
    first_sizes = {array.shape[0] if array.ndim else 0 for array in input_arrays.values()}
    if len(first_sizes) != 1:
        return [arrays]
    (count,) = first_sizes
    if all(array.ndim == len(dims[name] or ()) + 1 for name, array in input_arrays.items()):
        return [{name: array[start] for name, array in arrays.items()} for start in range(count)]
    batches = {sizes[0] if (sizes := dims[name]) else None for name in input_arrays}
    batch = batches.pop() if len(batches) == 1 else None
    if isinstance(batch, int) and 0 < batch < count and count % batch == 0:
        return [{name: array[start : start + batch] for name, array in arrays.items()} for start in range(0, count, batch)]
    return [arrays]
