"""The ONNX node tests, loaded when a test needs them: to compute the data of all 1,884 takes several seconds."""

from __future__ import annotations

import functools
import importlib
import warnings
from typing import Any


@functools.cache
def node_cases(*prefixes: str) -> tuple[Any, ...]:
    """Return the test cases whose names start with `test_` and one of `prefixes`, sorted by name; all without prefixes."""
    if prefixes:
        name_prefixes = tuple(f"test_{prefix}" for prefix in prefixes)
        return tuple(case for case in node_cases() if case.name.startswith(name_prefixes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some cases compute infinities on purpose
        from onnx.backend.test.loader import load_model_tests

        return tuple(sorted(load_model_tests(kind="node"), key=lambda case: str(case.name)))


@functools.cache
def op_cases(op: str) -> tuple[Any, ...]:
    """Return the cases of one op, such as `attention`, sorted by name, without those of the other ops."""
    from onnx.backend.test.case import node

    importlib.import_module(f"onnx.backend.test.case.node.{op}")
    cases = [case for case in node._NodeTestCases if case.name.startswith(f"test_{op}_")]
    return tuple(sorted(cases, key=lambda case: str(case.name)))
