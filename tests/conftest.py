"""Configuration of all tests: reproducible property tests, and an order of files that keeps all processes busy.

Property tests draw the same examples in every run; `make test-search` draws new ones. Files are handed to processes whole, in
this order: those with the most slow tests first, then those with the most tests, so that no long file is left at the end.
"""

from __future__ import annotations

import signal
from collections import Counter

import pytest
from hypothesis import settings
from support.examples import PROFILE

settings.register_profile("steady", derandomize=True, deadline=None)
settings.register_profile("deep", derandomize=True, deadline=None)
settings.register_profile("search", max_examples=500, deadline=None)
settings.load_profile(PROFILE)

# A shell starts the processes of its background jobs with SIGINT ignored, and every child would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Counter(item.path for item in items)
    slow_tests = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (-slow_tests[item.path], -tests[item.path], item.path))
