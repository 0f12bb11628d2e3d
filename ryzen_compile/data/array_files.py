"""Arrays of every element type in files, from which they are mapped instead of read."""

from __future__ import annotations

import mmap
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ryzen_compile.errors import RyzenError
from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.utils.mapped_pages import release_mapped_pages

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

_MIN_RELEASED_BYTES = 16 << 20
"""Smaller arrays stay in memory: finding their mapping takes longer than reading them."""

TEXT_DTYPE = "str"
"""The name of the element type of text, which NumPy stores with one length for all elements."""


def dtype_name(array: Array) -> str:
    """Return the name of the element type of `array`, which the file does not record for types of ml_dtypes."""
    return TEXT_DTYPE if array.dtype.kind in "OUS" else array.dtype.name


def storable(array: Array) -> Array:
    """Return `array` in an element type that NumPy's files support, without a copy unless it is text."""
    import numpy as np

    if dtype_name(array) == TEXT_DTYPE:
        return array.astype(np.str_)
    is_of_ml_dtypes = array.dtype.isbuiltin == 2
    return array.view(f"u{array.dtype.itemsize}") if is_of_ml_dtypes else array


def restored(array: Array, dtype: str) -> Array:
    """Return an array that `storable` returned in its element type `dtype`."""
    return array.astype(object) if dtype == TEXT_DTYPE else array.view(numpy_dtype(dtype))


def write_array(array: Array, path: Path) -> None:
    """Write `array` to the new file `path`. Raises RyzenError if the disk has no space for it."""
    import numpy as np

    free = shutil.disk_usage(path.parent).free
    if array.nbytes > free:
        raise RyzenError(
            f"an array of {array.nbytes / 1e9:.1f} GB does not fit in the {free / 1e9:.1f} GB that are free in {path.parent}",
            hint="use smaller shapes, or set TMPDIR to a folder on a larger disk",
        )
    np.save(path, storable(array), allow_pickle=False)


def map_array(path: Path, dtype: str) -> Array:
    """Return the array of a file, in the element type `dtype`. While it exists, the file is open, and is read on access."""
    import numpy as np

    return restored(np.asarray(np.load(path, mmap_mode="c", allow_pickle=False)), dtype)


def release_array(array: Array) -> None:
    """Release the memory of a large array of `map_array`, or of a part of one, until it is read again.

    Arrays that were modified, and arrays that are not mapped, are left as they are.
    """
    import numpy as np

    owner: object = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, mmap.mmap) and array.nbytes >= _MIN_RELEASED_BYTES:
        release_mapped_pages([array.ctypes.data])
