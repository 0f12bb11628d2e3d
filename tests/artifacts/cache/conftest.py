from __future__ import annotations

from pathlib import Path

import pytest
from support.cache_entries import Told

from ryzen_compile.artifacts.cache.store import Store


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def store(tmp_path: Path, told: Told) -> Store:
    return Store(tmp_path / "cache", progress=told)
