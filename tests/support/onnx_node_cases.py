"""The ONNX node tests, loaded once per process: the loader skips cases that an earlier partial load has returned."""

from __future__ import annotations

import functools
import warnings
from typing import Any


@functools.cache
def node_cases(*prefixes: str) -> tuple[Any, ...]:
    """Return the test cases whose names start with `test_` and one of `prefixes`; all 1,884 without prefixes."""
    if prefixes:
        name_prefixes = tuple(f"test_{prefix}" for prefix in prefixes)
        return tuple(case for case in node_cases() if case.name.startswith(name_prefixes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some cases compute infinities on purpose
        from onnx.backend.test.loader import load_model_tests

        return tuple(load_model_tests(kind="node"))
