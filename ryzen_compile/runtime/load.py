"""A package made ready: `load(path)` gives an engine, `engine.run(**inputs)` its outputs."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ryzen_compile import profile, registry
from ryzen_compile.errors import RyzenError, UsageError
from ryzen_compile.package.read import read
from ryzen_compile.runtime.choose import Choice, choose

if TYPE_CHECKING:
    from ryzen_compile.backends import Session
    from ryzen_compile.interface import Interface
    from ryzen_compile.profile import Profile


class Engine:
    """A graph of a package on this machine. Calls from several threads are safe; closing waits for none of them.

    Use it as a context manager, or call `close`.
    """

    def __init__(
        self,
        session: Session,
        *,
        choice: Choice,
        interface: Interface,
        profiles: tuple[Profile, ...],
        resources: ExitStack,
        load_seconds: float,
    ) -> None:
        self._session = session
        self._resources = resources
        self._lock = threading.Lock()
        self._closed = False
        self._fitting: dict[tuple[tuple[int, ...], ...], None] = {}
        self.choice = choice
        """What serves the graph here, and why."""
        self.interface = interface
        """Its inputs, outputs and states."""
        self.profiles = profiles
        """The shapes that it was built for and compared at."""
        self.load_seconds = load_seconds
        """How long loading took, digests and just-in-time compilation included."""

    def run(self, feed: Mapping[str, Any] | None = None, /, **inputs: Any) -> dict[str, Any]:
        """Run once and return the outputs by name.

        Inputs are numpy arrays or torch tensors, by name; names that are no Python identifiers go into the mapping `feed`.
        Where any input is a torch tensor the outputs are torch tensors, handed over without a copy. Raises ShapeError for a
        name, type or shape that does not fit, shapes outside of every profile included.
        """
        given = {**(feed or {}), **inputs}
        if self._closed:
            raise RyzenError("this engine is closed", hint="load the package again")
        self._check_shapes(given)
        outputs = self._session.run(given)
        if any(_is_torch(value) for value in given.values()):
            import torch

            return {name: value if _is_torch(value) else torch.from_dlpack(value) for name, value in outputs.items()}
        return dict(outputs)

    def __call__(self, feed: Mapping[str, Any] | None = None, /, **inputs: Any) -> Any:
        """Run once and return the only output, or a tuple of all in their order."""
        outputs = self.run(feed, **inputs)
        values = tuple(outputs[spec.name] for spec in self.interface.outputs)
        return values[0] if len(values) == 1 else values

    def close(self) -> None:
        """Give back what the engine holds; closing twice is fine."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Engine {self.choice.says}>"

    def _check_shapes(self, given: Mapping[str, Any]) -> None:
        specs = self.interface.inputs
        if not all(spec.name in given and hasattr(given[spec.name], "shape") for spec in specs):
            return  # what is missing or no array is the session's to name
        key = tuple(tuple(given[spec.name].shape) for spec in specs)
        if key not in self._fitting:
            shapes = {spec.name: shape for spec, shape in zip(specs, key, strict=True)}
            profile.fits(self.profiles, shapes)
            if len(self._fitting) < 1024:
                self._fitting[key] = None


def _is_torch(value: object) -> bool:
    return type(value).__module__.partition(".")[0] == "torch"


def load(
    path: str | os.PathLike[str],
    *,
    graph: str | None = None,
    backend: str | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> Engine:
    """Load a graph of the package at `path`: the best engine for this machine, else the portable graph.

    `graph` may be left out where the package holds one. `backend` limits the choice. `cache` is the folder for kernels that
    TensorRT-RTX compiles on first load (default: the user's cache folder). Digests are checked before anything is read. Raises
    PackageError for a damaged package or when nothing in it runs here, UsageError for an unknown graph or backend.
    """
    started = time.perf_counter()
    if backend is not None and backend not in registry.names("backends"):
        raise UsageError(f"there is no backend `{backend}`", hint=f"known are {', '.join(registry.names('backends'))}")
    package = read(path)
    chosen, choice = choose(package.manifest, graph, backend)
    package.verify_digests(*choice.files)
    with ExitStack() as resources:
        kernels = Path(cache) if cache is not None else _kernel_cache()
        opened = registry.find_backend(choice.backend).open(str(Path(package.path, choice.path)), cache=str(kernels))
        session = resources.enter_context(opened)
        return Engine(
            session,
            choice=choice,
            interface=chosen.interface,
            profiles=chosen.profiles,
            resources=resources.pop_all(),
            load_seconds=time.perf_counter() - started,
        )


def _kernel_cache() -> Path:
    from ryzen_compile.cache.store import default_folder

    return default_folder() / "kernels"
