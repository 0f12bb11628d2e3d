from __future__ import annotations

from pathlib import Path

import pytest
from support.cache_entries import RecordingProgress

from ryzen_compile.artifacts.cache.store import Store


@pytest.fixture
def told() -> RecordingProgress:
    return RecordingProgress()


@pytest.fixture
def store(tmp_path: Path, told: RecordingProgress) -> Store:
    return Store(tmp_path / "cache", progress=told)
