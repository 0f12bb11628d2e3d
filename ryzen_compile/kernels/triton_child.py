"""The child process that knows Triton: compiles, or interprets, what comes on standard input.

Triton reads its settings when it is imported, and its interpreter dies of a wild pointer; both stay in here. A message is
a line of JSON, and the arrays it names follow as bytes. Answers go to the descriptor given on the command line.
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
"""What memory holds that no kernel may write, and that none has written yet."""


def main(response_fd: int) -> None:
    """Answer until standard input ends."""
    out = os.fdopen(response_fd, "wb")
    try:
        _serve(out)
    finally:  # the parent does it too, unless it was killed
        shutil.rmtree(os.environ["TRITON_CACHE_DIR"], ignore_errors=True)


def _serve(out: BinaryIO) -> None:
    while line := sys.stdin.buffer.readline():
        order = msgspec.json.decode(line)
        arrays = [sys.stdin.buffer.read(array["bytes"]) for array in order.get("arrays", ())]
        try:
            answer, blobs = (_interpret(order, arrays)) if "arrays" in order else (_compile(order), [])
        except BaseException as error:  # noqa: BLE001 - said to the parent, which raises it
            blobs = []
            answer = {"error": _error_message(error), "trace": traceback.format_exc()}
        _send(out, answer, blobs)


def _send(out: BinaryIO, answer: dict[str, Any], blobs: list[bytes]) -> None:
    out.write(msgspec.json.encode(answer) + b"\n")
    for blob in blobs:
        out.write(blob)
    out.flush()


def _error_message(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' | '.join(lines[-3:])}"[:800]


def _compile(request: dict[str, Any]) -> dict[str, Any]:
    """Compile for one GPU; see `aot.py` for what goes in and out."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = pkgutil.resolve_name(request["source"])
    parameters: dict[str, str] = request["parameters"]
    if [*parameters] != function.arg_names:
        raise TypeError(f"the kernel takes ({', '.join(function.arg_names)}), and is declared with ({', '.join(parameters)})")
    names = [*parameters]
    aligned = [name for name, kind in parameters.items() if kind.startswith("*") or name in request["multiples"]]
    source = ASTSource(
        fn=function,
        signature=parameters,
        constexprs={(names.index(name),): value for name, value in request["constants"].items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"ptx_version": request["ptx_version"], "enable_fp_fusion": False, **request["options"]}
    compiled = triton.compile(source, target=GPUTarget("cuda", request["sm"], 32), options=options)
    count = sum(kind != "constexpr" for kind in parameters.values())
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
    """Return what ptxas makes of `ptx` as it now is, the registers of a thread, and the bytes it spills."""
    from triton import knobs

    ptxas = (knobs.nvidia.ptxas_blackwell if sm >= 100 else knobs.nvidia.ptxas).path
    target = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    if target is None:
        raise ValueError("the PTX names no target")
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx, encoding="ascii")
        command = [ptxas, "-v", "--fmad=false", f"--gpu-name={target[1]}", source, "-o", cubin]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"ptxas refuses it: {done.stderr.strip()}")
        used = re.search(r"Used (\d+) registers", done.stderr)
        spilled = re.search(r"(\d+) bytes spill stores", done.stderr)
        if used is None or spilled is None:
            raise ValueError(f"ptxas does not tell its registers: {done.stderr.strip()}")
        return cubin.read_bytes(), int(used[1]), int(spilled[1])


def _interpret(request: dict[str, Any], arrays: list[bytes]) -> tuple[dict[str, Any], list[bytes]]:
    """Run a kernel over copies of `arrays`, each between guards; see `interpret.py`."""
    import torch

    types = {"bfloat16": torch.bfloat16, "bool": torch.bool}
    function = pkgutil.resolve_name(request["source"])
    held, arguments = {}, {}
    for array, data in zip(request["arrays"], arrays, strict=True):
        guard = bytes([GUARD]) * GUARD_BYTES
        held[array["name"]] = torch.frombuffer(bytearray(guard + data + guard), dtype=torch.uint8)
    for name, buffer in request["pointers"].items():
        whole = held[buffer["buffer"]]
        inner = whole[GUARD_BYTES : len(whole) - GUARD_BYTES]
        kind = types.get(buffer["element"]) or getattr(torch, buffer["element"])
        arguments[name] = inner.view(kind) if len(inner) else torch.empty(0, dtype=kind)
    function[tuple(request["grid"])](**arguments, **request["scalars"], **request["constants"])
    for array, data in zip(request["arrays"], arrays, strict=True):
        name, whole = array["name"], held[array["name"]]
        if name not in request["returns"] and bytes(whole.numpy()[GUARD_BYTES : len(whole) - GUARD_BYTES]) != data:
            raise IndexError(f"the kernel wrote over its input `{name}`")
        if bool((whole[:GUARD_BYTES] != GUARD).any() or (whole[len(whole) - GUARD_BYTES :] != GUARD).any()):
            raise IndexError(f"the kernel wrote outside of `{name}`")
    blobs = [bytes(held[name].numpy()[GUARD_BYTES : len(held[name]) - GUARD_BYTES]) for name in request["returns"]]
    return {"sizes": [len(blob) for blob in blobs]}, blobs


if __name__ == "__main__":
    main(int(sys.argv[1]))
