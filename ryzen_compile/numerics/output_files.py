"""Large outputs of a model, kept in files instead of memory until they are compared."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ryzen_compile.errors import BackendError
from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.utils.closeable import Closeable

if TYPE_CHECKING:
    import numpy as np

    from ryzen_compile.spec.interface import Outputs

_MIN_FILE_BYTES = 16 << 20
"""Smaller arrays stay in memory."""


class OutputFiles(Closeable):
    """A temporary folder of arrays. Its files are mapped: the operating system drops their pages when memory is short."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ryzen-compile-", ignore_cleanup_errors=True)
        self._count = 0

    def keep(self, outputs: Outputs) -> dict[str, np.ndarray[Any, Any]]:
        """Return `outputs`, of which the large arrays are in files. Raises BackendError if the disk has no space for them."""
        return {name: self._write(array) if array.nbytes >= _MIN_FILE_BYTES else array for name, array in outputs.items()}

    def _write(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        import numpy as np

        if array.dtype.kind in "OUS":
            return array
        free = shutil.disk_usage(self._folder.name).free
        if array.nbytes > free:
            raise BackendError(
                f"an output of {array.nbytes / 1e9:.1f} GB does not fit in the {free / 1e9:.1f} GB that are free for temporary "
                f"files in {Path(self._folder.name).parent}",
                hint="give smaller --max-shapes, or set TMPDIR to a larger disk",
            )
        path = Path(self._folder.name, f"{self._count}.bin")
        self._count += 1
        array.tofile(path)
        return np.memmap(path, numpy_dtype(array.dtype.name), mode="r", shape=array.shape)

    def close(self) -> None:
        """Remove the files; the arrays must not be used any more."""
        self._folder.cleanup()
