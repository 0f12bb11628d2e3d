"""ONNX's own node tests, read once a process: reading a part of them first would hide the rest from a later reader."""

from __future__ import annotations

import functools
import warnings
from typing import Any


@functools.cache
def node_cases(*prefixes: str) -> tuple[Any, ...]:
    """Return the tests whose names begin with one of `prefixes`, behind `test_`; all 1,884 where none is given."""
    if prefixes:
        wanted = tuple(f"test_{prefix}" for prefix in prefixes)
        return tuple(case for case in node_cases() if case.name.startswith(wanted))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tests compute infinities on purpose
        from onnx.backend.test.loader import load_model_tests

        return tuple(load_model_tests(kind="node"))
