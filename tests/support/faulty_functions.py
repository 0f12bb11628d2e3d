"""Functions for child processes that fail like code which runs a user's model."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time

import msgspec

from ryzen_compile.diagnostic import Diagnostic
from ryzen_compile.errors import BackendError, ShapeError
from ryzen_compile.processes.child_call import call_in_child
from ryzen_compile.processes.operation import performing
from ryzen_compile.progress import Progress, StageItems


def describe_process(argument: bytes, progress: Progress) -> bytes:
    """Return the argument and the environment of the process."""
    sys.stdout.write("output that nobody reads")
    with progress.stage("describe"):
        progress.report(Diagnostic(code="cache-hit", severity="info", message="described"))
    return msgspec.json.encode(
        {
            "argument": msgspec.json.decode(argument),
            "folder": os.getcwd(),
            "variable": os.environ.get("RYZEN_COMPILE_TEST"),
            "temporary": tempfile.mkdtemp(),
            "pid": os.getpid(),
        }
    )


def count_items(argument: bytes, progress: Progress) -> bytes:
    """Count the number of items in the argument, while other stages begin and end."""
    count = msgspec.json.decode(argument)
    with progress.stage("outer", StageItems("items", count + 1)) as outer:
        outer.advance()
        with progress.stage("inner", StageItems("parts")) as inner:
            for _ in range(count):
                outer.advance()
            inner.advance(3)
        with contextlib.suppress(ShapeError), progress.stage("failing"):
            raise ShapeError("refused")
    return b"null"


def hang(argument: bytes, progress: Progress) -> bytes:
    """Never return; a process that this one starts does not end either."""
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "child-of-hang"])
    with performing("running model.onnx, on x 2x3"):
        time.sleep(600)
    return b""


def import_onnx_ir(argument: bytes, progress: Progress) -> bytes:
    """Return whether SymPy is imported with onnx_ir."""
    import onnx_ir

    return msgspec.json.encode(bool(onnx_ir) and "sympy.core" in sys.modules)


def allocate(argument: bytes, progress: Progress) -> bytes:
    """Use the number of bytes in the argument."""
    with performing("running model.onnx, on x 2x3"):
        data = bytearray(msgspec.json.decode(argument))
        data[::4096] = b"x" * len(data[::4096])
        time.sleep(600)
    return b""


def abort(argument: bytes, progress: Progress) -> bytes:
    """Abort as native code does."""
    with performing("running model.onnx, on x 2x3"):
        os.write(2, b"terminate called after throwing\n")
        os.abort()
    return b""


def hang_in_child(argument: bytes, progress: Progress) -> bytes:
    """Call a function that never returns in another child process."""
    return call_in_child("support.faulty_functions:hang", b"null", label="inner call")


def leave(argument: bytes, progress: Progress) -> bytes:
    """End the process without an answer."""
    os._exit(7)


def refuse(argument: bytes, progress: Progress) -> bytes:
    """Raise an error for the user, of the type that the argument names."""
    if msgspec.json.decode(argument) == "shape":
        raise ShapeError("`x` has 3 rows", hint="give 2", location="x")
    raise BackendError("no engine", may_be_one_target=False)


def fail(argument: bytes, progress: Progress) -> bytes:
    """Raise the exception that the argument names."""
    raise {"value": ValueError("wrong"), "memory": MemoryError(), "os": OSError(28, "No space left", "/tmp/x")}[
        msgspec.json.decode(argument)
    ]
