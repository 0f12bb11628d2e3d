"""Errors in op declarations are reported by `problems`."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ryzen_compile import registry
from ryzen_compile.spec.op import AttributeParam, Op, TensorParam
from ryzen_compile.spec.op_validation import problems

VALID = registry.find_op("VectorDequantizeInt4")
APPEND_EVICT = registry.find_op("KVAppendEvict")


def test_our_own_ops_are_valid() -> None:
    assert registry.broken_ops() == {}
    assert [problem for op in registry.ops().values() for problem in problems(op)] == []


def with_kernel(op: Op, **changes: Any) -> dict[str, Any]:
    assert op.kernel is not None
    return {"kernel": dataclasses.replace(op.kernel, **changes)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "My.Op"}, "`My.Op` is not a valid name"),
        ({"reference": "nowhere.a:f"}, "`nowhere.a:f` belongs to a package that is not installed"),
        (with_kernel(VALID, source="nowhere.b:f"), "`nowhere.b:f` belongs to a package that is not installed"),
        ({"type_constraints": {"T": ("float99",)}}, "`float99` is not an element type"),
        ({"type_constraints": {"T": ("float64",)}}, "kernels do not support float64"),
        ({"outputs": (TensorParam("x", "T", "... 2*DD"),)}, "the shape of `x` refers to `DD`, which is not defined"),
        (
            {"outputs": (TensorParam("x", "T", "... 2/BYTES"),)},
            "the shape of `x`: `2/BYTES` is not a valid dimension expression",
        ),
        ({"constraints": ("BITES > 1",)}, "`constraints` refers to `BITES`"),
        ({"dim_limits": {"BITES": (1, 2)}}, "`dim_limits` refers to `BITES`"),
        ({"bytes_moved": "ROWS * size_X"}, "`bytes_moved` refers to `size_X`"),
        ({"tolerance": {"float32": 0.0}}, "`tolerance` has no entry for bfloat16"),
        ({"test_cases": ()}, "must declare `make_inputs` and `test_cases`"),
        ({"make_inputs": None}, "must declare `make_inputs` and `test_cases`"),
        ({"typical_dims": {"ROWS": 1}}, "`typical_dims` must set BYTES"),
        (
            {"typical_dims": {**VALID.typical_dims, "X": 1}},
            "`typical_dims` sets X, which is not a dim of an input or an attribute",
        ),
        (
            {"attributes": (AttributeParam("turns", int, 0, 1, ""),), "test_cases": ({"ROWS": 1, "BYTES": 8, "turns": 0.5},)},
            "test case 0: `turns` must be an integer (got 0.5)",
        ),
        ({"attributes": (AttributeParam("turns", bool, 0, 1, ""),)}, "has type bool, but must be int or float"),
        (with_kernel(VALID, grid=()), "the grid must have one to three axes (got 0)"),
        (with_kernel(VALID, grid=("1",) * 4), "the grid must have one to three axes (got 4)"),
        (with_kernel(VALID, grid=("ROW",)), "the grid refers to `ROW`"),
        (with_kernel(VALID, static_dims=frozenset("Q")), "`static_dims` refers to `Q`, which is not a dim"),
        (with_kernel(VALID, scalars={"rows": "rows"}), "the scalar `rows` refers to `rows`"),
        (with_kernel(VALID, scalars={"codes": "ROWS"}), "the kernel has several parameters called `codes`"),
        (with_kernel(VALID, constants={"A": "nothing"}), "the constant `A` refers to `nothing`"),
        (with_kernel(VALID, constants={"BYTES": "2 * BYTES"}), "the constant `BYTES` has the name of a dim"),
        (
            with_kernel(VALID, tactics=({"E": 1}, {"F": 1})),
            "`tactics` must not be empty, and all tactics must set the same constants",
        ),
        (with_kernel(VALID, tactics=()), "`tactics` must not be empty"),
    ],
)
def test_invalid_declarations_are_reported(changes: dict[str, Any], message: str) -> None:
    assert message in "; ".join(problems(dataclasses.replace(VALID, **changes)))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (TensorParam("score_out", "float32", "B H C", aliases_input="scores"), "aliases `scores`, which is not an input"),
        (
            TensorParam("score_out", "float32", "B H S", aliases_input="score"),
            "aliases `score`, which has another type or shape",
        ),
    ],
)
def test_an_output_must_alias_an_input_of_the_same_type_and_shape(output: TensorParam, message: str) -> None:
    outputs = tuple(output if param.name == output.name else param for param in APPEND_EVICT.outputs)
    assert message in "; ".join(problems(dataclasses.replace(APPEND_EVICT, outputs=outputs)))
