"""Objects with a `close` method as context managers."""

from __future__ import annotations

import abc
from types import TracebackType
from typing import Self


class Closeable(abc.ABC):
    """An object that is closed at the end of a `with` block."""

    @abc.abstractmethod
    def close(self) -> None:
        """Free the resources of the object."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
