"""Parent side of the child process that runs Triton."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from ryzen_compile.errors import BackendError
from ryzen_compile.utils.closeable import Closeable

INSTALL_HINT = "pip install 'ryzen-compile[kernels]'"

_TRITON_ENV_PREFIXES = ("TRITON_", "LLVM_", "MLIR_", "DISABLE_", "ENABLE_", "NVPTX_", "PTXAS_", "ALLOW_", "USE_IR_LOC")
"""Prefixes of environment variables that affect compilation; they are not passed on, so that kernels are reproducible."""

_STDERR_TAIL_BYTES = 4096
_SHUTDOWN_TIMEOUT_SECONDS = 2.0


class TritonProcess(Closeable):
    """A child process that serves one request at a time. Call `close`, or use it as a context manager."""

    def __init__(self, *, interpret: bool) -> None:
        """Start the process without waiting for it. Raises BackendError if Triton, or PyTorch to interpret, is missing."""
        for module, install_hint in (
            ("triton", INSTALL_HINT),
            *([("torch", "pip install 'ryzen-compile[torch]'")] if interpret else []),
        ):
            if importlib.util.find_spec(module) is None:
                raise BackendError(f"kernels need `{module}`, which is not installed", hint=install_hint)
        self._folder = tempfile.TemporaryDirectory(prefix="ryzen-compile-triton-", ignore_cleanup_errors=True)
        self._stderr_path = Path(self._folder.name, "stderr.txt")
        read_fd, write_fd = os.pipe()
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_TRITON_ENV_PREFIXES)} | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "TRITON_CACHE_DIR": self._folder.name,
            "TRITON_INTERPRET": "1" if interpret else "0",
            "TRITON_DISABLE_LINE_INFO": "1",
        }
        with open(self._stderr_path, "wb") as stderr_file:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "ryzen_compile.kernels.triton_child", str(write_fd)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=stderr_file,
                pass_fds=(write_fd,),
                env=environment,
            )
        os.close(write_fd)
        self._responses = os.fdopen(read_fd, "rb")

    @property
    def has_exited(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    def request(self, message: dict[str, Any], blobs: Sequence[bytes] = ()) -> tuple[dict[str, Any], list[bytes]]:
        """Send a request and wait for the response. Raises BackendError if the request fails or the process dies."""
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
            exit_code = self._process.wait()
            stderr_lines = self._stderr_path.read_bytes()[-_STDERR_TAIL_BYTES:].decode(errors="replace").strip().splitlines()
            raise BackendError(
                f"the process that runs Triton died (exit {exit_code}){': ' + stderr_lines[-1] if stderr_lines else ''}"
            )
        response: dict[str, Any] = msgspec.json.decode(line)
        if "error" in response:
            raise BackendError(response["error"])
        return response, [self._responses.read(size) for size in response.get("sizes", ())]

    def close(self) -> None:
        """Stop the process and remove its temporary folder."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()  # the process ends at the end of its input
        try:
            self._process.wait(_SHUTDOWN_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._responses.close()
        self._folder.cleanup()
