"""Fixtures of the cache tests: a store in a temporary folder, and the progress object that records its messages."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.cache_entries import RecordingProgress

from ryzen_compile.artifacts.cache.store import Store


@pytest.fixture
def progress() -> RecordingProgress:
    return RecordingProgress()


@pytest.fixture
def store(tmp_path: Path, progress: RecordingProgress) -> Store:
    return Store(tmp_path / "cache", progress=progress)
