"""Hostile data files for `--data`: mutated .npz archives, and scripts."""

from __future__ import annotations

import io
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from fuzzing.runner import FuzzCase
from fuzzing.sources import packages
from fuzzing.values import INTEGERS, NAMES, mutate_bytes

_COMMANDS: tuple[tuple[str, ...], ...] = (
    ("run", "linear.ryzen", "--data"),
    ("run", "decoder.ryzen", "--data"),
    ("run", "sequences.ryzen", "--data"),
    ("bench", "linear.ryzen", "--duration", "0.05", "--data"),
    ("compare", "linear.ryzen", "--baseline", "linear.onnx", "--data"),
    ("verify", "linear.ryzen", "--data"),
    ("build", "linear.onnx", "-o", "o.ryzen", "--gpu", "cpu", "--no-cache", "-q", "--data"),
)
_SHAPES = (
    "(4, 64)",
    "(64,)",
    "(2, 4, 64)",
    "()",
    "(0, 64)",
    "(4, 0)",
    "(1000000000000, 64)",
    "(-1, 64)",
    "(True, 64)",
    "(4, 64.0)",
    "None",
)
_DTYPES = ("<f4", ">f4", "<f8", "<i8", "|b1", "|O", "<U5", "|S3", "<M8[s]", "|V4", "<c8", "<f2", "[('a', '<f4')]", "<U90000000")
_SCRIPTS = (
    "def load_data(): yield {'x': np.zeros((4, 64), np.float32)}",
    "def load_data(): yield {'x': np.zeros((4, 64))}",
    "def load_data(): return [{'x': np.full((4, 64), np.nan, np.float32)}]",
    "def load_data(): yield {1: 2}",
    "def load_data(): yield {'x': [[1, 2], [3]]}",
    "def load_data(): yield {'x': object()}",
    "def load_data(): yield {'x': np.array([object()] * 4)}",
    "def load_data(): yield None",
    "def load_data(): yield {}",
    "def load_data(): yield 3",
    "def load_data(): return 3",
    "def load_data(): return {'x': 1}",
    "def load_data(x): yield {}",
    "def load_data(): raise KeyError('k')",
    "def load_data(): raise KeyError(b'\\xff', '\\x1b[2J\\n' * 50)",
    "def load_data(): yield {'x': np.zeros((4, 64), np.float32)}; 1 / 0",
    "def load_data(): load_data()",
    "def load_data(): raise SystemExit",
    "def load_data(): raise GeneratorExit",
    "def load_data(): raise MemoryError",
    "def load_data(): yield {'x': np.zeros((1 << 40, 64), np.float32)}",
    "def load_data(): yield {'x': np.broadcast_to(np.float32(1), (1 << 40, 64))}",
    "def load_data(): import no_such_module",
    "load_data = 3",
    "load_data = iter",
    "load_data = property",
    "def load_data(:",
    "raise SystemExit(0)",
    "import sys; sys.exit('done')",
    "def load_data(): yield {'x': np.ma.masked_all((4, 64), np.float32)}",
    "class load_data:\n  def __iter__(self): raise OSError(28, 'No space left on device')",
    "class E(Exception):\n  def __str__(self): raise RuntimeError\ndef load_data(): raise E",
    "class A:\n  shape = property(lambda self: 1 / 0)\n  __array__ = lambda *a, **k: 'text'\ndef load_data(): yield {'x': A()}",
    "class D(dict):\n  def __iter__(self): raise ValueError('x')\n  items = None\ndef load_data(): yield D(x=1)",
    "def load_data(): yield {'x': np.zeros((4, 64), np.float32), '\\x1b[2J': 1}",
)
"""Scripts after `import numpy as np`."""


def make_case(rng: random.Random) -> FuzzCase:
    """Return a command with a hostile data file."""
    command = rng.choice(_COMMANDS)
    is_script = rng.random() < 0.3
    if is_script:
        text = f"import numpy as np\n{rng.choice(_SCRIPTS)}\n"
        content = mutate_bytes(text.encode(), rng) if rng.random() < 0.3 else text.encode()
        name = "data.py"
    else:
        content, name = _archive(rng), "data.npz"

    def make_files(folder: Path) -> None:
        for specimen in ("linear", "decoder", "sequences"):
            shutil.copytree(packages() / f"{specimen}.ryzen", folder / f"{specimen}.ryzen")
            shutil.copy(packages() / f"{specimen}.onnx", folder / f"{specimen}.onnx")
        (folder / name).write_bytes(content)

    outputs = ("o.ryzen", "o.rejected.ryzen", "__pycache__")
    return FuzzCase(arguments=(*command, name), outputs=outputs, note=name, make_files=make_files)


def _archive(rng: random.Random) -> bytes:
    stream = io.BytesIO()
    compression = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
    names = rng.choice((["x"], ["x"], ["x"], ["x", "y"], ["ids", "mask"], [], [rng.choice(NAMES)]))
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name in names:
            try:
                archive.writestr(f"{name}{rng.choice(('.npy', '.npy', '.npy', ''))}", _array(rng))
            except (ValueError, IndexError):
                continue  # a name that no archive can hold
    content = stream.getvalue()
    for _ in range(rng.choice((0, 0, 1, 2))):
        content = mutate_bytes(content, rng)
    return content


def _array(rng: random.Random) -> bytes:
    if rng.random() < 0.4:
        stream = io.BytesIO()
        values: Any = np.zeros((4, 64), rng.choice((np.float32, np.float64, np.int64)))
        np.save(stream, values)
        return mutate_bytes(stream.getvalue(), rng) if rng.random() < 0.7 else stream.getvalue()
    descr, shape = rng.choice(_DTYPES), rng.choice(_SHAPES)
    quoted = descr if descr.startswith("[") else repr(descr)
    header = f"{{'descr': {quoted}, 'fortran_order': {rng.choice((True, False, 0))}, 'shape': {shape}, }}\n".encode()
    version = rng.choice((b"\x01\x00", b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x09"))
    length = len(header) if rng.random() < 0.8 else rng.choice(INTEGERS) % 65536
    return b"\x93NUMPY" + version + length.to_bytes(2 if version == b"\x01\x00" else 4, "little") + header + bytes(1024)
