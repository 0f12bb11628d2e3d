"""Shared fixture of the op tests: the implementation runners, started once per session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.op_implementations import OpImplementations


@pytest.fixture(scope="session")
def implementations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpImplementations]:
    runners = OpImplementations(tmp_path_factory.mktemp("mutants"))
    yield runners
    runners.close()
