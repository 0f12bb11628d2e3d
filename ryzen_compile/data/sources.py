"""Sources of samples: files, scripts and recipes, each held to the interface that it feeds."""

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
from ryzen_compile.spec.interface import Interface
from ryzen_compile.utils.user_script import call_user_function, describe_error, load_callable

if TYPE_CHECKING:
    from ryzen_compile.spec.passes import Inputs
    from ryzen_compile.spec.recipe import Recipe

Array = np.ndarray[Any, Any]

_ZIP_MAGIC = b"PK"
"""What every .npz file begins with; numpy takes anything else for a pickle."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Feeds that fit an interface, read anew each time they are iterated, one at a time."""

    description: str
    """Where they come from: `recipe minilm, seed 0`, `sentences.npz`."""
    interface: Interface
    read: Callable[[], Iterable[tuple[str, Mapping[str, Any]]]]
    """Yield each raw feed with the words that name it in an error."""

    def __iter__(self) -> Iterator[Inputs]:
        """Yield the feeds; raises ShapeError for one that does not fit, and where there is none at all."""
        count = 0
        for source, feed in self.read():
            count += 1
            yield validate_inputs(feed, self.interface, source=source)
        if not count:
            raise ShapeError(f"{self.description} holds no sample")


def from_recipe(recipe: Recipe, *, seed: int) -> Samples:
    """Return a recipe's own samples."""
    says = f"recipe {recipe.name}, seed {seed}"
    return Samples(
        description=says,
        interface=recipe.interface,
        read=lambda: ((f"{says}, sample {at}", feed) for at, feed in enumerate(recipe.samples(seed))),
    )


def from_npz(path: str | Path, interface: Interface) -> Samples:
    """Return the samples of an .npz file, or of all .npz files of a folder by name: arrays by the names of the inputs.

    A file is one feed where its arrays have the ranks of the inputs. It is many where all have one axis more, of one size
    (samples lie along it), or where the inputs have a fixed batch and all arrays hold the same multiple of it. Nothing is
    unpickled. Raises RyzenError where nothing is there.
    """
    root = Path(path)
    files = sorted(root.glob("*.npz")) if root.is_dir() else [root]
    if not files:
        raise RyzenError(f"`{root}` holds no .npz file", hint="give an .npz file, or a folder of them")
    for file in files:
        if not file.is_file():
            raise RyzenError(f"there is no file `{file}`", hint="give an .npz file, or a folder of them")

    def read() -> Iterator[tuple[str, Mapping[str, Any]]]:
        for file in files:
            parts = _split_samples(_load_npz(file), interface)
            for at, feed in enumerate(parts):
                yield (f"`{file}`" if len(parts) == 1 else f"`{file}`, sample {at}"), feed

    return Samples(description=f"`{root}`", interface=interface, read=read)


def from_script(text: str, interface: Interface) -> Samples:
    """Return the samples of a data loader script, `file.py[:function]`, as Polygraphy's `--data-loader-script` takes it.

    The function, `load_data` unless named, returns or yields dicts of arrays by the names of the inputs.
    """
    function = load_callable(text, default="load_data")

    def read() -> Iterator[tuple[str, Mapping[str, Any]]]:
        found = call_user_function(text, function)
        if isinstance(found, Mapping) or not isinstance(found, Iterable):
            raise RyzenError(
                f"`{text}` returned a {type(found).__name__}, not a sequence of feeds",
                hint='yield {"input name": array, ...} for each sample',
            )
        feeds, at = iter(found), -1
        while (feed := call_user_function(text, lambda: next(feeds, None))) is not None:
            at += 1
            if not isinstance(feed, Mapping):
                raise RyzenError(
                    f"`{text}`: sample {at} is a {type(feed).__name__}, not a dict", hint='yield {"input name": array, ...}'
                )
            yield f"`{text}`, sample {at}", feed

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
            raise UsageError(f"`{file}` holds pickled objects, which are never read", hint="save plain arrays") from None
        raise UsageError(f"`{file}` cannot be read as .npz: {describe_error(error)}") from error


def _split_samples(arrays: dict[str, Array], interface: Interface) -> list[dict[str, Array]]:
    """Return the feeds that lie in one file."""
    dims = {spec.name: spec.dims for spec in interface.inputs}
    known = {name: array for name, array in arrays.items() if dims.get(name) is not None}
    if not arrays or len(known) != len(arrays):
        return [arrays]
    firsts = {array.shape[0] if array.ndim else 0 for array in known.values()}
    if len(firsts) != 1:
        return [arrays]
    (count,) = firsts
    if all(array.ndim == len(dims[name] or ()) + 1 for name, array in known.items()):
        return [{name: array[at] for name, array in arrays.items()} for at in range(count)]
    batches = {sizes[0] if (sizes := dims[name]) else None for name in known}
    batch = batches.pop() if len(batches) == 1 else None
    if isinstance(batch, int) and 0 < batch < count and count % batch == 0:
        return [{name: array[at : at + batch] for name, array in arrays.items()} for at in range(0, count, batch)]
    return [arrays]
