"""Custom ops as TensorRT plugins, made through NVIDIA's own decorators and creators.

Their bindings load once three libraries are there, which are stubs; see `plugin_drive.py` for what else stands in. What a
builder would get is held against the declaration: shapes, types, tactics, launches, and the PTX itself.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ryzen_compile import dims, registry
from ryzen_compile.errors import BackendError
from ryzen_compile.kernels import Instance
from ryzen_compile.op import Op

HERE = Path(__file__).parent
OPS = [op for op in registry.ops().values() if op.kernel is not None]


def drive(op: Op, elements: dict[str, str], fixed: dict[str, int], stubs: Path) -> Any:
    command = [sys.executable, HERE / "plugin_drive.py", op.name, json.dumps(elements), "90", json.dumps(fixed)]
    done = subprocess.run(
        command, env={**os.environ, "LD_LIBRARY_PATH": str(stubs)}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise AssertionError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("op", OPS, ids=lambda op: str(op.name))
def test_a_builder_gets_what_the_op_declares(op: Op, nvidia_stubs: Path) -> None:
    """Every dim that need not be known when the engine is built is a symbol; launches are worked out for the typical dims."""
    assert op.kernel is not None
    attributes = {one.name: one.kind(op.typical[one.name]) for one in op.attributes}
    sizes: dict[str, Any] = {name: int(value) for name, value in op.typical.items() if name not in attributes}
    elements = {variable: op.elements[variable][-1 if len(op.elements[variable]) < 3 else 1] for variable in op.variables}
    answer = drive(op, elements, {name: sizes[name] for name in op.kernel.exact}, nvidia_stubs)
    known = {**sizes, **attributes, "...": (sizes.get("ROWS", 1), 1)}
    named = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}
    kinds = [op.element_of(port, elements) for port in (*op.inputs, *op.outputs)]
    assert answer["combination"] == [named.get(kind, kind.upper()) for kind in kinds]
    assert answer["types"] == answer["combination"][len(op.inputs) :]
    assert [tuple(shape) for shape in answer["shapes"]] == [dims.shape_of(port.dims, known) for port in op.outputs]
    names = [port.name for port in op.inputs]
    assert answer["over"] == [-1 if port.over is None else names.index(port.over) for port in op.outputs]
    assert len(answer["tactics"]) == len(op.kernel.tactics)
    for tactic, found in enumerate(answer["tactics"]):
        instance = Instance(op, elements, attributes, sizes, tactic)
        launch = found["launch"]
        assert (launch["grid_x"], launch["grid_y"], launch["grid_z"]) == instance.grid(known)
        assert (launch["block_x"], launch["block_y"], launch["block_z"]) == (32 * instance.options["num_warps"], 1, 1)
        assert launch["shared_mem"] <= 48 << 10, "more needs a permission that TensorRT is not known to ask for"
        assert found["scalars"] == instance.scalars(known)
        entry = re.search(rf"\.entry {found['kernel']}\((.*?)\)", found["ptx"], re.DOTALL)
        assert entry is not None
        widths = re.findall(r"\.param \.[us](\d+)", entry[1])
        expected = [kind for kind in instance.parameters.values() if kind != "constexpr"]
        assert widths == ["64" if kind.startswith("*") else "32" for kind in expected]


def test_a_type_that_the_op_does_not_take_is_refused(nvidia_stubs: Path) -> None:
    op = registry.find_op("KVAppendEvict")
    with pytest.raises(AssertionError, match=r"KVAppendEvict: `k` is DataType.INT32, and must be one of float32, float16"):
        drive(op, {"T": "int32"}, {"D": 8, "E": 8}, nvidia_stubs)


def test_what_must_be_known_when_the_engine_is_built_is_named(nvidia_stubs: Path) -> None:
    op = registry.find_op("KVAppendEvict")
    with pytest.raises(AssertionError, match="KVAppendEvict: D must be known when the engine is built"):
        drive(op, {"T": "float16"}, {}, nvidia_stubs)


def test_only_kernels_become_plugins() -> None:
    with pytest.raises(BackendError, match="TRT_Attention has no kernel"):
        _ = Instance(registry.find_op("TRT_Attention"), {"T": "float32", "M": "bool", "I": "int64"}, {}, {}).kernel
