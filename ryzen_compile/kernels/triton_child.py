"""Child process that runs Triton: it compiles or interprets the kernels of the requests on standard input.

Triton reads its settings on import, and its interpreter crashes on an invalid pointer; a separate process isolates both. A
request is a line of JSON, followed by the bytes of the arrays that it lists. Responses have the same form and are written to
the file descriptor given on the command line.
"""

from __future__ import annotations

import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from ryzen_compile.kernels.ptx import drop_hidden_parameters

GUARD_BYTES = 4096
GUARD = 0xA5
"""Byte pattern of guard areas around tensors, and of outputs that no kernel has written."""


def main(response_fd: int) -> None:
    """Serve requests until the end of standard input."""
    out = os.fdopen(response_fd, "wb")
    try:
        _serve(out)
    finally:  # the parent removes it as well, unless it was killed
        shutil.rmtree(os.environ["TRITON_CACHE_DIR"], ignore_errors=True)


def _serve(out: BinaryIO) -> None:
    while line := sys.stdin.buffer.readline():
        request = msgspec.json.decode(line)
        arrays = [sys.stdin.buffer.read(array["bytes"]) for array in request.get("arrays", ())]
        try:
            response, blobs = _interpret(request, arrays) if "arrays" in request else (_compile(request), [])
        except BaseException as error:  # noqa: BLE001 - the parent raises it
            blobs = []
            response = {"error": _error_message(error), "trace": traceback.format_exc()}
        _send(out, response, blobs)


def _send(out: BinaryIO, response: dict[str, Any], blobs: list[bytes]) -> None:
    out.write(msgspec.json.encode(response) + b"\n")
    for blob in blobs:
        out.write(blob)
    out.flush()


def _error_message(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' | '.join(lines[-3:])}"[:800]


def _compile(request: dict[str, Any]) -> dict[str, Any]:
    """Compile a kernel for one compute capability; see `aot.compile_request` and `aot.CompiledKernel` for the formats."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = pkgutil.resolve_name(request["source"])
    parameters: dict[str, str] = request["parameters"]
    if [*parameters] != function.arg_names:
        raise TypeError(f"the kernel takes ({', '.join(function.arg_names)}), but is declared with ({', '.join(parameters)})")
    names = [*parameters]
    aligned = [name for name, type_str in parameters.items() if type_str.startswith("*") or name in request["multiples"]]
    source = ASTSource(
        fn=function,
        signature=parameters,
        constexprs={(names.index(name),): value for name, value in request["constants"].items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"ptx_version": request["ptx_version"], "enable_fp_fusion": False, **request["options"]}
    compiled = triton.compile(source, target=GPUTarget("cuda", request["sm"], 32), options=options)
    count = sum(type_str != "constexpr" for type_str in parameters.values())
    ptx, hidden = drop_hidden_parameters(compiled.asm["ptx"], count)
    metadata = compiled.metadata
    cubin, registers, spilled_bytes = _assemble(ptx, request["sm"])
    return {
        "name": metadata.name,
        "ptx": ptx,
        "cubin": cubin,
        "registers": registers,
        "spilled_bytes": spilled_bytes,
        "shared_bytes": metadata.shared,
        "threads": metadata.num_warps * 32,
        "hidden": hidden,
        "triton": triton.__version__,
    }


def _assemble(ptx: str, sm: int) -> tuple[bytes, int, int]:
    """Assemble `ptx` with ptxas; return the cubin, the registers per thread and the spilled bytes per thread."""
    from triton import knobs

    ptxas = (knobs.nvidia.ptxas_blackwell if sm >= 100 else knobs.nvidia.ptxas).path
    target = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    if target is None:
        raise ValueError("the PTX has no `.target` directive")
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx, encoding="ascii")
        command = [ptxas, "-v", "--fmad=false", f"--gpu-name={target[1]}", source, "-o", cubin]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise ValueError(f"ptxas failed: {result.stderr.strip()}")
        register_match = re.search(r"Used (\d+) registers", result.stderr)
        spill_match = re.search(r"(\d+) bytes spill stores", result.stderr)
        if register_match is None or spill_match is None:
            raise ValueError(f"ptxas did not report register usage: {result.stderr.strip()}")
        return cubin.read_bytes(), int(register_match[1]), int(spill_match[1])


def _interpret(request: dict[str, Any], arrays: list[bytes]) -> tuple[dict[str, Any], list[bytes]]:
    """Run a kernel on copies of `arrays`, each between guard areas; see `interpreter.py`.

    Raises IndexError if the kernel writes to a guard area or to an input that no output aliases.
    """
    import torch

    types = {"bfloat16": torch.bfloat16, "bool": torch.bool}
    function = pkgutil.resolve_name(request["source"])
    buffers, arguments = {}, {}
    for array, data in zip(request["arrays"], arrays, strict=True):
        guard = bytes([GUARD]) * GUARD_BYTES
        buffers[array["name"]] = torch.frombuffer(bytearray(guard + data + guard), dtype=torch.uint8)
    for name, pointer in request["pointers"].items():
        buffer = buffers[pointer["buffer"]]
        inner = buffer[GUARD_BYTES : len(buffer) - GUARD_BYTES]
        dtype = types.get(pointer["element"]) or getattr(torch, pointer["element"])
        arguments[name] = inner.view(dtype) if len(inner) else torch.empty(0, dtype=dtype)
    function[tuple(request["grid"])](**arguments, **request["scalars"], **request["constants"])
    for array, data in zip(request["arrays"], arrays, strict=True):
        name, buffer = array["name"], buffers[array["name"]]
        if name not in request["returns"] and bytes(buffer.numpy()[GUARD_BYTES : len(buffer) - GUARD_BYTES]) != data:
            raise IndexError(f"the kernel wrote over its input `{name}`")
        if bool((buffer[:GUARD_BYTES] != GUARD).any() or (buffer[len(buffer) - GUARD_BYTES :] != GUARD).any()):
            raise IndexError(f"the kernel wrote outside of `{name}`")
    blobs = [bytes(buffers[name].numpy()[GUARD_BYTES : len(buffers[name]) - GUARD_BYTES]) for name in request["returns"]]
    return {"sizes": [len(blob) for blob in blobs]}, blobs


if __name__ == "__main__":
    main(int(sys.argv[1]))
