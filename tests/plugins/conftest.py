"""What the tests of the ops share: the runners of their lives, started once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.op_implementations import OpImplementations


@pytest.fixture(scope="session")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpImplementations]:
    runners = OpImplementations(tmp_path_factory.mktemp("mutants"))
    yield runners
    runners.close()
