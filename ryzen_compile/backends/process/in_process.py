"""`InProcessWorker`: runs the builds of a backend that does not build in child processes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ryzen_compile.errors import BackendError, RyzenError
from ryzen_compile.progress import Progress, SilentProgress
from ryzen_compile.utils.closeable import Closeable
from ryzen_compile.utils.files import hash_file

if TYPE_CHECKING:
    from ryzen_compile.backends.api import Backend, BuildRequest, BuiltEngine


class InProcessWorker(Closeable):
    """Builds in this process, with the interface of `Worker`: without limits, and without protection from a crash."""

    def __init__(self, backend: Backend) -> None:
        """Build with `backend`."""
        self._backend = backend

    def build(self, request: BuildRequest, progress: Progress | None = None) -> BuiltEngine:
        """Build one engine with the `build` method of the backend.

        Raises BackendError if the engine cannot be built, or if the request limits memory or time; nothing is left at the
        path of the output then.
        """
        name = self._backend.name
        if request.seconds is not None or request.memory_bytes is not None:
            raise BackendError(
                f"`{name}` builds in the process of the build, which limits neither its memory nor its time",
                hint="build without limits",
                may_be_one_target=False,
            )
        try:
            built = self._backend.build(request, progress or SilentProgress())
            self._check(request, built)
        except BaseException as error:
            Path(request.output).unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise RyzenError(
                    f"the engine cannot be written: `{error.filename or request.output}`: {error.strerror or error}",
                    hint="free disk space, or change the output",
                ) from error
            if isinstance(error, RyzenError) or not isinstance(error, Exception):
                raise
            raise BackendError(
                f"`{name}` failed: {type(error).__name__}: {error}", hint="report it to the author of the backend"
            ) from error
        return built

    def _check(self, request: BuildRequest, built: BuiltEngine) -> None:
        """Raise BackendError unless the engine is at the requested path and has the recorded digest."""
        fault = None
        if built.path == request.onnx_path and self._backend.traits.portable:
            return
        if built.path != request.output or not Path(built.path).is_file():
            fault = "wrote no engine to the requested path"
        elif hash_file(Path(built.path), "sha256") != built.sha256:
            fault = "returned a sha256 that is not the one of the engine"
        if fault is not None:
            raise BackendError(f"`{self._backend.name}` {fault}", hint="report it to the author of the backend")

    def kill(self) -> None:
        """Do nothing: a build in this process cannot be aborted."""

    def shutdown(self) -> None:
        """Do nothing: there is no child process."""

    def close(self) -> None:
        """Do nothing: there is no child process."""
