"""The protocol between a process, its fork server and the children that the server forks.

A call has a scratch folder with its request and its result. The server receives the folder with four file descriptors; the
child writes events to a pipe as JSON lines, and the server writes the child's process id and exit status to another pipe.
"""

from __future__ import annotations

from typing import Any

import msgspec

from ryzen_compile.diagnostic import Diagnostic
from ryzen_compile.progress import StageItems
from ryzen_compile.utils.record import Record

REQUEST_FILE, RESULT_FILE = "request.json", "result.json"
"""The files of a call in its scratch folder: a `CallRequest`, and the JSON that the function returned."""

SHARED_PACKAGES = frozenset(
    {"ryzen_compile", "ryzen_passes", "ryzen_plugins", "ml_dtypes", "numpy", "onnx", "onnx_ir", "onnxruntime", "polygraphy"}
)
"""The packages whose modules the server imports for all children once a child has imported them: they run no model."""

MAX_MESSAGE_BYTES = 1 << 15
"""The size of the largest `ServerRequest`."""


class ServerRequest(Record, frozen=True):
    """A message to the server, with four file descriptors if a child is to be forked: events, status, breadcrumb, output."""

    folder: str | None
    """The scratch folder of a call; None: only import modules."""
    preload: tuple[str, ...]
    """The modules that the server imports first."""


class CallRequest(Record, frozen=True):
    """A call of a function, and the environment of the process that asks for it."""

    function: str
    """The function `module:name`, called with the argument as JSON and the progress; it returns JSON."""
    argument: msgspec.Raw
    working_directory: str
    environment: dict[str, str]
    import_path: tuple[str, ...]
    memory_bytes: int | None
    """The limits of the call, which apply to calls that the child makes itself."""
    seconds: float | None


class StageBegan(Record, frozen=True, tag=True):
    """A stage began."""

    stage: int
    """The number of the stage, unique in the child."""
    title: str
    items: StageItems | None = None


class StageAdvanced(Record, frozen=True, tag=True):
    """A stage has finished items."""

    stage: int
    count: int


class StageEnded(Record, frozen=True, tag=True):
    """A stage has ended."""

    stage: int


class DiagnosticReported(Record, frozen=True, tag=True):
    """A diagnostic was reported."""

    diagnostic: Diagnostic


class TextWritten(Record, frozen=True, tag=True):
    """The function has a part of a text for the caller before it returns."""

    text: str


class CallReturned(Record, frozen=True, tag=True):
    """The function returned; its result is in the scratch folder."""

    imported: tuple[str, ...] = ()
    """The modules that the child imported and that later children can share."""


class RyzenErrorRaised(Record, frozen=True, tag=True):
    """The function raised a RyzenError."""

    type_name: str
    message: str
    hint: str | None
    diagnostics: tuple[Diagnostic, ...]
    may_be_one_target: bool


class ExceptionRaised(Record, frozen=True, tag=True):
    """The function raised another exception."""

    type_name: str
    message: str
    traceback: str
    os_error: tuple[int, str, Any] | None = None
    """For an OSError: its number, its description and its file."""


ChildEvent = (
    StageBegan
    | StageAdvanced
    | StageEnded
    | DiagnosticReported
    | TextWritten
    | CallReturned
    | RyzenErrorRaised
    | ExceptionRaised
)
