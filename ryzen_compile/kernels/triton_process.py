"""The parent's end of a child process that knows Triton."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from ryzen_compile.errors import BackendError

INSTALL_HINT = "pip install 'ryzen-compile[kernels]'"

_TRITON_ENV_PREFIXES = ("TRITON_", "LLVM_", "MLIR_", "DISABLE_", "ENABLE_", "NVPTX_", "PTXAS_", "ALLOW_", "USE_IR_LOC")
"""How the names of environment variables begin by which Triton compiles otherwise: a kernel is the same in every shell."""

_STDERR_TAIL_BYTES = 4096
_SHUTDOWN_TIMEOUT_SECONDS = 2.0


class TritonProcess:
    """A process that serves one message after the other. Close it, or use it in `with`."""

    def __init__(self, *, interpret: bool) -> None:
        """Start it; returns at once. Raises BackendError where Triton is not installed."""
        for needed, mend in (
            ("triton", INSTALL_HINT),
            *([("torch", "pip install 'ryzen-compile[torch]'")] if interpret else []),
        ):
            if importlib.util.find_spec(needed) is None:
                raise BackendError(f"kernels need `{needed}`, which is not installed", hint=mend)
        self._folder = tempfile.TemporaryDirectory(prefix="ryzen-compile-triton-", ignore_cleanup_errors=True)
        self._stderr_path = Path(self._folder.name, "said")
        ours, theirs = os.pipe()
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_TRITON_ENV_PREFIXES)} | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "TRITON_CACHE_DIR": self._folder.name,
            "TRITON_INTERPRET": "1" if interpret else "0",
            "TRITON_DISABLE_LINE_INFO": "1",
        }
        with open(self._stderr_path, "wb") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "ryzen_compile.kernels.triton_child", str(theirs)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=said,
                pass_fds=(theirs,),
                env=environment,
            )
        os.close(theirs)
        self._responses = os.fdopen(ours, "rb")

    @property
    def has_exited(self) -> bool:
        """Whether the process is dead."""
        return self._process.poll() is not None

    def request(self, message: dict[str, Any], blobs: Sequence[bytes] = ()) -> tuple[dict[str, Any], list[bytes]]:
        """Send a message and wait for the answer. Raises BackendError for a refusal, and where the process died."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(message) + b"\n")
            for blob in blobs:
                self._process.stdin.write(blob)
            self._process.stdin.flush()
            line = self._responses.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            self._process.kill()
            code = self._process.wait()
            told = self._stderr_path.read_bytes()[-_STDERR_TAIL_BYTES:].decode(errors="replace").strip().splitlines()
            raise BackendError(f"the process that runs Triton died (exit {code}){': ' + told[-1] if told else ''}")
        answer: dict[str, Any] = msgspec.json.decode(line)
        if "error" in answer:
            raise BackendError(answer["error"])
        return answer, [self._responses.read(size) for size in answer.get("sizes", ())]

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()  # it then ends by itself
        try:
            self._process.wait(_SHUTDOWN_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._responses.close()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
