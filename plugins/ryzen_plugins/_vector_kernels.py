"""Kernel specifications shared by the ops that quantize and dequantize vectors: ROWS vectors, one block of rows per program."""

from __future__ import annotations

from collections.abc import Mapping

from ryzen_compile.spec.op import KernelSpec

ROW_LIMITS = (1, 2**31 - 1)
"""Minimum and maximum number of vectors."""


def byte_kernel_spec(source: str) -> KernelSpec:
    """Return the specification of a kernel of an op with one code per byte."""
    return _row_kernel_spec(
        source,
        dim="D",
        constants={"D": "D", "BLOCK_D": "power_of_two(D)", "BLOCK_R": "max(1, ELEMENTS // power_of_two(D))"},
        tactics=((1024, 2), (4096, 4), (4096, 8)),
    )


def packed_kernel_spec(source: str, *, dim: str, constants: Mapping[str, str]) -> KernelSpec:
    """Return the specification of a kernel of an op with two codes per byte; `dim` is the static dim of a vector."""
    return _row_kernel_spec(source, dim=dim, constants=constants, tactics=((512, 1), (2048, 4), (4096, 4)))


def _row_kernel_spec(
    source: str, *, dim: str, constants: Mapping[str, str], tactics: tuple[tuple[int, int], ...]
) -> KernelSpec:
    """`tactics` are pairs of elements per program and warps."""
    return KernelSpec(
        source=source,
        scalars={"rows": "ROWS"},
        constants=constants,
        static_dims=frozenset({dim}),
        grid=("ceil_div(ROWS, BLOCK_R)",),
        tactics=tuple({"ELEMENTS": elements, "num_warps": warps} for elements, warps in tactics),
    )
