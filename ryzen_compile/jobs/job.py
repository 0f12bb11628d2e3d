"""`Job`: one unit of work, with the key that identifies its result, its input files and the resources that it needs.

A job has a JSON form: its type is the tag, its fields are data, and its files are named relative to a folder. Any process that
has the input files in such a folder can run it. A kind of job is a subclass of `Job` with a function registered by `runs`;
`PackageJob` has none and runs only in the process of the build.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar, cast

import msgspec

from ryzen_compile.artifacts.cache.key import CacheKey
from ryzen_compile.errors import RyzenError, did_you_mean
from ryzen_compile.processes.limits import ResourceLimits
from ryzen_compile.progress import Progress
from ryzen_compile.utils.record import Record

ResultT = TypeVar("ResultT")


class JobKey(Record, frozen=True):
    """Everything that determines the result of one kind of job, and nothing else. Subclasses set `kind` and add the fields.

    Input files are represented by digests. A missing field that does affect the result causes wrong hits.
    """

    kind: ClassVar[str]
    """The kind of job: `engine`."""

    @property
    def cache_key(self) -> CacheKey:
        """The key of the result in the cache, with one part per leaf field: `builder.options.refit`."""
        # A float field may hold an int or -0.0: decode once, so that equal keys have equal parts.
        fields = msgspec.to_builtins(msgspec.json.decode(msgspec.json.encode(self), type=type(self)))
        return CacheKey(kind=self.kind, parts=_flatten(fields))


class Resources(Record, frozen=True):
    """What a job needs, and the limits within which it runs. They do not affect its result."""

    memory_bytes: int | None = None
    """The maximum memory in bytes; None: no limit."""
    seconds: float | None = None
    """The maximum duration, including that of retries; None: no limit."""
    gpu: int | None = None
    """The compute capability of the GPU that is needed, major * 10 + minor; None: no GPU."""
    exclusive: bool = False
    """Whether no other job of the executor may run at the same time, as for a measurement of time."""

    @property
    def limits(self) -> ResourceLimits:
        """The limits of a process that runs the job."""
        return ResourceLimits(memory_bytes=self.memory_bytes, seconds=self.seconds)

    @classmethod
    def within(cls, limits: ResourceLimits | None, *, exclusive: bool = False) -> Self:
        """Return resources with the given limits; None: no limits."""
        limits = limits or ResourceLimits()
        return cls(memory_bytes=limits.memory_bytes, seconds=limits.seconds, exclusive=exclusive)


class Job(Record, Generic[ResultT], frozen=True, kw_only=True, tag=True):
    """One unit of work. Subclasses are the kinds of jobs; they set `result_type` and the type of `key`."""

    result_type: ClassVar[Any]
    """The type of the result, which has a JSON form."""
    cacheable: ClassVar[bool] = True
    """Whether a stored result may take the place of a run. False for a measurement of time, or if no key covers all inputs."""

    isolated: ClassVar[bool] = False
    """Whether the job runs a user's model, and therefore in a child process of its own; see `isolated.run_isolated`."""
    preload: ClassVar[tuple[str, ...]] = ()
    """For an isolated job: the modules that it needs, which child processes share."""

    key: JobKey
    inputs: dict[str, str] = {}
    """The input files: path -> digest. Paths are relative to the folder of the job, or absolute for files of the user."""
    resources: Resources = Resources()

    @property
    def label(self) -> str:
        """What the job makes, for messages."""
        return self.key.kind

    def path_of(self, name: str) -> str:
        """Return the path of an output file, relative to the folder of the job. `name` is the file's name in the result."""
        return name

    def reuse_message(self, result: ResultT) -> str | None:
        """Return the message for the user when a stored result takes the place of a run; None: no message."""
        return f"{self.label}: taken from the cache"


@dataclass(frozen=True, kw_only=True)
class JobOutput(Generic[ResultT]):
    """The result of a job and its output files."""

    result: ResultT
    files: Mapping[str, str] = field(default_factory=dict)
    """The name of each output file (see `Job.path_of`) and its sha256."""
    complete: bool = True
    """Whether the result may be reused. False if a cause that may go away, such as a missing library, affected it."""


JobFunction = Callable[[Any, Path, Progress], JobOutput[Any]]
"""Runs a job of one kind: the job, its folder, which has the input files and receives the output files, and the progress."""


_functions: dict[str, tuple[type[Job[Any]], JobFunction]] = {}
_FunctionT = TypeVar("_FunctionT", bound=JobFunction)


def runs(job_type: type[Job[Any]]) -> Callable[[_FunctionT], _FunctionT]:
    """Register the decorated function as the one that runs jobs of `job_type`."""

    def register(function: _FunctionT) -> _FunctionT:
        _functions[job_type.__name__] = job_type, function
        return function

    return register


def run_function(job_type: type[Job[Any]]) -> JobFunction:
    """Return the registered function that runs jobs of `job_type`. Raises RyzenError if there is none."""
    return _find(job_type.__name__)[1]


def encode_job(job: Job[Any]) -> bytes:
    """Return the job as JSON, for another process that runs it."""
    return msgspec.json.encode(job)


def decode_job(data: bytes) -> Job[Any]:
    """Return the job that `encode_job` encoded. Raises RyzenError if its type is unknown or the data is no job of that type."""
    try:
        job_type, _ = _find(msgspec.json.decode(data, type=_JobHeader).type)
        return cast("Job[Any]", msgspec.json.decode(data, type=job_type))
    except msgspec.DecodeError as error:
        raise RyzenError(f"this is not a job: {error}", hint="use the same version of ryzen-compile on both sides") from error


class _JobHeader(msgspec.Struct):
    type: str


def _find(name: str) -> tuple[type[Job[Any]], JobFunction]:
    if name not in _functions:
        raise RyzenError(f"no function runs jobs of type `{name}`", hint=did_you_mean(name, list(_functions)))
    return _functions[name]


def _flatten(fields: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the leaves of nested mappings by dotted name. Absent values (None, empty mappings) have no leaf."""
    parts: dict[str, str] = {}
    for name, value in fields.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict):
            parts |= _flatten(value, f"{path}.")
        elif value is not None:
            parts[path] = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return parts
