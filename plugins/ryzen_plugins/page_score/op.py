"""Declarations of the ops PageScoreBound and PageScoreCosine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ryzen_compile.spec.op import FLOATS, InputFactory, KernelSpec, Op, TensorParam
from ryzen_plugins._cache_declarations import TILE_TACTICS
from ryzen_plugins._declaration import RyzenOp, dims_table


def _make_page_counts(random: np.random.Generator, dims: Mapping[str, int]) -> np.ndarray[Any, Any]:
    filled = random.integers(0, dims["P"], size=dims["B"], endpoint=True)
    return np.where(random.random(dims["B"]) < 0.5, dims["P"], filled).astype(np.int32)


def _make_bound_inputs(random: np.random.Generator, dims: Mapping[str, int], attributes: Mapping[str, float]) -> dict[str, Any]:
    """Return random queries, and per-element key ranges of pages."""
    pages = [dims[name] for name in "BHPD"]
    center, spread = random.normal(size=pages), np.abs(random.normal(size=pages))
    return {
        "query": random.normal(size=[dims[name] for name in "BHGD"]),
        "low": center - spread,
        "high": center + spread,
        "filled": _make_page_counts(random, dims),
    }


def _make_cosine_inputs(
    random: np.random.Generator, dims: Mapping[str, int], attributes: Mapping[str, float]
) -> dict[str, Any]:
    """Return random queries and centroids, some of which are zero."""
    query = random.normal(size=[dims[name] for name in "BHGD"])
    centroid = random.normal(size=[dims[name] for name in "BHPD"]) / np.sqrt(dims["D"])
    return {
        "query": query * (random.random(query.shape[:3]) < 0.9)[..., None],
        "centroid": centroid * (random.random(centroid.shape[:3]) < 0.9)[..., None],
        "filled": _make_page_counts(random, dims),
    }


_QUERY = TensorParam("query", "T", "B H G D", "the queries of one step: G heads per key/value head")
_FILLED = TensorParam("filled", "int32", "B", "number of pages in use of each sequence; these are its first pages")


def _page_score_op(
    name: str,
    *,
    description: str,
    formula: str,
    statistics: tuple[TensorParam, ...],
    tolerance: float,
    kernel: str,
    bytes_moved: str,
    make_inputs: InputFactory,
) -> Op:
    """Return an op that scores pages from `statistics` of their keys; `kernel` is the name of its kernel function."""
    return RyzenOp(
        name=name,
        description=description,
        formula=formula,
        inputs=(_QUERY, *statistics, _FILLED),
        outputs=(TensorParam("score", "float32", "B H P", "score of each page; -inf if it is not in use"),),
        type_constraints={"T": FLOATS},
        reference=f"ryzen_plugins.page_score.reference:{name}",
        dim_limits={"B": (1, 65535), "H": (1, 65535), "G": (1, 1024), "P": (1, 65535), "D": (1, 1024)},
        tolerance=dict.fromkeys(FLOATS, tolerance),
        kernel=KernelSpec(
            source=f"ryzen_plugins.page_score.kernel:{kernel}",
            scalars={"heads": "H", "group": "G", "pages": "P"},
            constants={
                "D": "D",
                "BLOCK_D": "power_of_two(D)",
                "PAGES": "min(power_of_two(P), max(1, TILE_BYTES // (power_of_two(D) * size_T)))",
            },
            static_dims=frozenset("D"),
            grid=("B * H", "ceil_div(P, PAGES)"),
            tactics=TILE_TACTICS,
        ),
        bytes_moved=bytes_moved,
        typical_dims={"B": 1, "H": 8, "G": 4, "P": 2048, "D": 128},
        test_cases=dims_table("B H G P D", (2, 3, 2, 7, 8), (3, 1, 5, 70, 33), (1, 1, 1, 1, 1)),
        make_inputs=make_inputs,
    )


PAGE_SCORE_BOUND = _page_score_op(
    "PageScoreBound",
    description="compute an upper bound of the attention logits of a page's keys from their elementwise minimum and maximum",
    formula="""
        bound = sum over d of max(q, 0) high + min(q, 0) low,   q = query[b, h, g, d], low and high of [b, h, p, d], in float32;
                this equals the sum of max(q low, q high) if low <= high
        score = the largest bound over the G query heads, ignoring NaN; -inf if all are NaN, or if p >= filled[b]
    """,
    statistics=(
        TensorParam("low", "T", "B H P D", "elementwise minimum of the keys of a page"),
        TensorParam("high", "T", "B H P D", "elementwise maximum of the keys of a page"),
    ),
    tolerance=1e-5,
    kernel="page_score_bound",
    bytes_moved="B * H * (P * (2 * D * size_T + 4) + G * D * size_T)",
    make_inputs=_make_bound_inputs,
)

PAGE_SCORE_COSINE = _page_score_op(
    "PageScoreCosine",
    description="compute the cosine between queries and the mean direction of a page's keys",
    formula="""
        cosine = (q . c) / (|q| |c|),   q = query[b, h, g], c = centroid[b, h, p], in float32; 0 if q or c is zero or contains
                 an element that is not finite
        score  = the largest cosine over the G query heads; -inf if p >= filled[b]
    """,
    statistics=(TensorParam("centroid", "T", "B H P D", "the mean of a page's keys, each divided by its norm"),),
    tolerance=1e-6,
    kernel="page_score_cosine",
    bytes_moved="B * H * (P * (D * size_T + 4) + G * D * size_T)",
    make_inputs=_make_cosine_inputs,
)
