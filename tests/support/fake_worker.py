"""A worker without a child process, which writes fake engines."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from ryzen_compile.backends.api import BuildRequest, BuiltEngine
from ryzen_compile.errors import BackendError
from ryzen_compile.utils.files import hash_file


class FakeWorker:
    """A worker that writes a fake engine, or raises what `failure` returns for the targets of a request."""

    def __init__(self, failure: Callable[[list[str]], BackendError | None], seconds: float = 0.0) -> None:
        self._failure, self._seconds = failure, seconds
        self.requests: list[BuildRequest] = []

    @property
    def groups(self) -> list[list[str]]:
        return [[target.name for target in request.targets] for request in self.requests]

    def build(self, request: BuildRequest, progress: object) -> BuiltEngine:
        self.requests.append(request)
        time.sleep(self._seconds)
        names = self.groups[-1]
        if (error := self._failure(names)) is not None:
            raise error
        Path(request.output).write_bytes(",".join(names).encode())
        return BuiltEngine(
            path=request.output,
            sha256=hash_file(Path(request.output), "sha256"),
            size_bytes=len(",".join(names)),
            backend="tensorrt-rtx",
            backend_version="1",
            target_names=tuple(names),
            seconds=0.0,
        )

    def shutdown(self) -> None: ...
    def close(self) -> None: ...
    def kill(self) -> None: ...
