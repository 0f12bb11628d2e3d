"""Scores by which kv-evict keeps tokens, one module each: formula, paper, ONNX form, PyTorch form, statistics.

A module of this folder, or of a package with an entry point in the group `ryzen_compile.kv_scores`, is a value of the option
`score` of kv-evict.
"""

from __future__ import annotations


def members() -> dict[str, str]:
    """Return the scores of this package as {score name: module name}."""
    from ryzen_compile.registry import modules_of

    return modules_of(__name__)
