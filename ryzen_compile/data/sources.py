"""Sources of samples: files, scripts and recipes. All samples are validated against an interface."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any

import numpy as np

from ryzen_compile.data.npz import open_npz
from ryzen_compile.data.validation import check_signature, validate_inputs
from ryzen_compile.errors import RyzenError, ShapeError
from ryzen_compile.spec.interface import Inputs, Interface
from ryzen_compile.utils.path_hints import missing_path_hint
from ryzen_compile.utils.user_script import call_user_function, load_callable

if TYPE_CHECKING:
    from ryzen_compile.spec.recipe import Recipe

Array = np.ndarray[Any, Any]

_MAX_SAMPLES = 1_000_000
"""The maximum number of samples in one file."""


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
    same multiple of it. Types and shapes are checked before arrays are read. Pickled objects are rejected.

    Raises:
        RyzenError: The file or folder does not exist, or the folder has no .npz files.
    """
    root = Path(path)
    files = sorted(root.glob("*.npz")) if root.is_dir() else [root]
    if not files:
        raise RyzenError(f"folder `{root}` contains no .npz files", hint="give an .npz file, or a folder of .npz files")
    for file in files:
        if not file.is_file():
            hint = missing_path_hint(file, "give an .npz file, or a folder of .npz files")
            raise RyzenError(f"there is no file `{file}`", hint=hint)

    def read() -> Iterator[tuple[str, Mapping[str, Any]]]:
        for file in files:
            with open_npz(file) as archive:
                shapes = {name: header.shape for name, header in archive.headers.items()}
                selectors = _sample_selectors(shapes, interface)
                for selector in selectors[:1]:  # all samples of a file have the same shapes
                    check_signature(
                        {name: header.dtype for name, header in archive.headers.items()},
                        {name: _sample_shape(shape, selector) for name, shape in shapes.items()},
                        interface,
                        source=f"`{file}`" if len(selectors) == 1 else f"`{file}`, sample 0",
                    )
                arrays = archive.read()
            for index, selector in enumerate(selectors):
                sample = {name: array[selector] for name, array in arrays.items()}
                yield (f"`{file}`" if len(selectors) == 1 else f"`{file}`, sample {index}"), sample

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
        samples, index = call_user_function(text, lambda: iter(result)), -1

        def next_sample() -> Any:
            sample = next(samples, None)
            return dict(sample) if isinstance(sample, Mapping) else sample

        while (sample := call_user_function(text, next_sample)) is not None:
            index += 1
            if not isinstance(sample, dict):
                raise RyzenError(
                    f"`{text}`: sample {index} must be a dict (got {type(sample).__name__})",
                    hint='yield {"input name": array, ...}',
                )
            yield f"`{text}`, sample {index}", sample

    return Samples(description=f"`{text}`", interface=interface, read=read)


def _sample_selectors(shapes: Mapping[str, Sequence[int]], interface: Interface) -> Sequence[EllipsisType | int | slice]:
    """Return the index of each sample of one file into its arrays, which have these shapes."""
    dims = {spec.name: spec.dims for spec in interface.inputs}
    input_shapes = {name: shape for name, shape in shapes.items() if dims.get(name) is not None}
    if not shapes or len(input_shapes) != len(shapes):
        return [...]
    first_sizes = {shape[0] if shape else 0 for shape in input_shapes.values()}
    if len(first_sizes) != 1:
        return [...]
    (count,) = first_sizes
    if count <= _MAX_SAMPLES and all(len(shape) == len(dims[name] or ()) + 1 for name, shape in input_shapes.items()):
        return range(count)
    batches = {sizes[0] if (sizes := dims[name]) else None for name in input_shapes}
    batch = batches.pop() if len(batches) == 1 else None
    if isinstance(batch, int) and 0 < batch < count <= batch * _MAX_SAMPLES and count % batch == 0:
        return [slice(start, start + batch) for start in range(0, count, batch)]
    return [...]


def _sample_shape(shape: tuple[int, ...], selector: EllipsisType | int | slice) -> tuple[int, ...]:
    """Return the shape of one sample of an array."""
    if isinstance(selector, slice):
        return (selector.stop - selector.start, *shape[1:])
    return shape[1:] if isinstance(selector, int) else shape
