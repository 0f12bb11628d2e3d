"""Parameters, tactics and tiles shared by the ops that compare or merge tokens."""

from __future__ import annotations

from collections.abc import Mapping

from ryzen_compile.spec.op import KernelSpec, TensorParam

METRIC = TensorParam(
    "metric", "T", "B N D", "features by which tokens are compared, e.g. the keys of an encoder averaged over heads"
)
SLOTS = TensorParam("slots", "int32", "M", "only the shape is read: the number of tokens after merging")
SIZE = TensorParam("size", "float32", "B N", "number of tokens that each token represents; 0 for padding")


def pairs_kernel_spec(
    source: str,
    *,
    scalars: Mapping[str, str],
    constants: Mapping[str, str] | None = None,
    rows: tuple[str, str],
    columns: str,
) -> KernelSpec:
    """Return the specification of a kernel that compares tokens in tiles.

    `rows` are the dim of the tokens that one program compares and the constant of their number, `columns` the constant of the
    number of tokens that they are compared with at a time.
    """
    return KernelSpec(
        source=source,
        scalars=scalars,
        constants={
            "D": "D",
            **(constants or {}),
            "BLOCK_D": "max(16, min(128 // size_T, power_of_two(D)))",
            rows[1]: "SPAN // size_T",
        },
        static_dims=frozenset("D"),
        grid=(f"ceil_div({rows[0]}, {rows[1]})", "B"),
        tactics=(
            {"SPAN": 64, columns: 64, "num_warps": 4, "num_stages": 2},
            {"SPAN": 128, columns: 64, "num_warps": 8, "num_stages": 2},
            {"SPAN": 64, columns: 32, "num_warps": 4, "num_stages": 2},
        ),
    )


def copy_kernel_spec(
    source: str,
    *,
    scalars: Mapping[str, str],
    constants: Mapping[str, str] | None = None,
    rows: tuple[str, str],
    tactics: tuple[tuple[int, int], ...],
) -> KernelSpec:
    """Return the specification of a kernel that writes rows of up to 1,024 elements at a time.

    `rows` are the number of rows and the constant of the number of rows per program, `tactics` pairs of elements per tile and
    warps.
    """
    return KernelSpec(
        source=source,
        scalars=scalars,
        constants={
            "D": "D",
            **(constants or {}),
            rows[1]: "max(2, min(64, TILE // power_of_two(min(D, 1024))))",
            "BLOCK_D": "power_of_two(min(D, 1024))",
        },
        static_dims=frozenset("D"),
        grid=(f"ceil_div({rows[0]}, {rows[1]})", "B", "ceil_div(D, BLOCK_D)"),
        tactics=tuple({"TILE": tile, "num_warps": warps} for tile, warps in tactics),
    )
