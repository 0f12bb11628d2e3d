"""Large outputs of a model, kept in files instead of memory until they are compared."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ryzen_compile.data.array_files import dtype_name, map_array, write_array
from ryzen_compile.utils.closeable import Closeable

if TYPE_CHECKING:
    import numpy as np

    from ryzen_compile.spec.interface import Outputs

_MIN_FILE_BYTES = 16 << 20
"""Smaller arrays stay in memory, up to `_MAX_MEMORY_BYTES` together."""
_MAX_MEMORY_BYTES = 256 << 20
"""The maximum size of all arrays that stay in memory."""


class OutputFiles(Closeable):
    """A temporary folder of arrays. Its files are mapped: the operating system drops their pages when memory is short."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ryzen-compile-", ignore_cleanup_errors=True)
        self._count = 0
        self._memory_bytes = 0

    def keep(self, outputs: Outputs) -> dict[str, np.ndarray[Any, Any]]:
        """Return `outputs`, most of which are in files. Raises RyzenError if the disk has no space for them."""
        return {name: self._keep(array) for name, array in outputs.items()}

    def _keep(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if array.nbytes < _MIN_FILE_BYTES and self._memory_bytes + array.nbytes <= _MAX_MEMORY_BYTES:
            self._memory_bytes += array.nbytes
            return array
        path = Path(self._folder.name, f"{self._count}.npy")
        self._count += 1
        write_array(array, path)
        return map_array(path, dtype_name(array))

    def close(self) -> None:
        """Remove the files; the arrays must not be used any more."""
        self._folder.cleanup()
