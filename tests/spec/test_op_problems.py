"""What is wrong with a declaration is said when the op is listed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ryzen_compile import registry
from ryzen_compile.spec.op import AttributeParam, Op, TensorParam
from ryzen_compile.spec.op_validation import problems

WHOLE = registry.find_op("VectorDequantizeInt4")
EVICT = registry.find_op("KVAppendEvict")


def test_our_own_are_whole() -> None:
    assert registry.broken_ops() == {}
    assert [problem for op in registry.ops().values() for problem in problems(op)] == []


def kernel(op: Op, **changes: Any) -> dict[str, Any]:
    assert op.kernel is not None
    return {"kernel": dataclasses.replace(op.kernel, **changes)}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": "My.Op"}, "`My.Op` is not a name"),
        ({"reference": "nowhere.a:f"}, "`nowhere.a:f` is in a package that is not installed"),
        (kernel(WHOLE, source="nowhere.b:f"), "`nowhere.b:f` is in a package that is not installed"),
        ({"elements": {"T": ("float99",)}}, "`float99` is not an element type"),
        ({"elements": {"T": ("float64",)}}, "no kernel takes float64"),
        ({"outputs": (TensorParam("x", "T", "... 2*DD"),)}, "the shape of `x` speaks of `DD`, which is no dim"),
        ({"outputs": (TensorParam("x", "T", "... 2/BYTES"),)}, "the shape of `x`: `2/BYTES` is not an expression"),
        ({"needs": ("BITES > 1",)}, "`needs` speaks of `BITES`"),
        ({"limits": {"BITES": (1, 2)}}, "`limits` speaks of `BITES`"),
        ({"bytes_moved": "ROWS * size_X"}, "`bytes_moved` speaks of `size_X`"),
        ({"tolerance": {"float32": 0.0}}, "its tolerance says nothing of bfloat16"),
        ({"cases": ()}, "needs `draw` and `cases`"),
        ({"draw": None}, "needs `draw` and `cases`"),
        ({"typical": {"ROWS": 1}}, "`typical` does not say what BYTES is"),
        ({"typical": {**WHOLE.typical_dims, "X": 1}}, "`typical` speaks of X, which no input has"),
        (
            {"attributes": (AttributeParam("turns", int, 0, 1, ""),), "cases": ({"ROWS": 1, "BYTES": 8, "turns": 0.5},)},
            "case 0: `turns` is 0.5, and must be a whole number",
        ),
        ({"attributes": (AttributeParam("turns", bool, 0, 1, ""),)}, "is of type bool, and must be int or float"),
        (kernel(WHOLE, grid=()), "its grid has 0 axes"),
        (kernel(WHOLE, grid=("1",) * 4), "its grid has 4 axes"),
        (kernel(WHOLE, grid=("ROW",)), "the grid speaks of `ROW`"),
        (kernel(WHOLE, exact=frozenset("Q")), "`exact` speaks of `Q`, which is no dim"),
        (kernel(WHOLE, scalars={"rows": "rows"}), "the scalar `rows` speaks of `rows`"),
        (kernel(WHOLE, scalars={"codes": "ROWS"}), "the kernel has two parameters `codes`"),
        (kernel(WHOLE, constants={"A": "nothing"}), "the constant `A` speaks of `nothing`"),
        (kernel(WHOLE, constants={"BYTES": "2 * BYTES"}), "the constant `BYTES` is named like a dim"),
        (kernel(WHOLE, tactics=({"E": 1}, {"F": 1})), "its tactics must be there, and all set the same constants"),
        (kernel(WHOLE, tactics=()), "its tactics must be there"),
    ],
)
def test_what_is_not_whole_is_named(changes: dict[str, Any], says: str) -> None:
    assert says in "; ".join(problems(dataclasses.replace(WHOLE, **changes)))


@pytest.mark.parametrize(
    ("port", "says"),
    [
        (TensorParam("score_out", "float32", "B H C", aliases_input="scores"), "is written over `scores`, which is no input"),
        (
            TensorParam("score_out", "float32", "B H S", aliases_input="score"),
            "is written over `score`, which is of another type or shape",
        ),
    ],
)
def test_an_output_is_written_over_an_input_of_its_own_kind(port: TensorParam, says: str) -> None:
    outputs = tuple(port if one.name == port.name else one for one in EVICT.outputs)
    assert says in "; ".join(problems(dataclasses.replace(EVICT, outputs=outputs)))
