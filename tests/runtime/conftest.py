"""Packages of the small decoder, built once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from support import tiny_decoder

import ryzen_compile as rc
from ryzen_compile.runtime.load import Engine


def built(factory: pytest.TempPathFactory, **options: Any) -> Engine:
    source = tiny_decoder.write(factory.mktemp("decoder") / "tiny.onnx", **options)
    return rc.load(rc.build(source, gpu="cpu", compare=False, cache=False).path)


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Caches written in place, with room for padding."""
    with built(tmp_path_factory) as engine:
        yield engine


@pytest.fixture(scope="session")
def swapping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The same with two memories for each cache."""
    with built(tmp_path_factory, in_place=False) as engine:
        yield engine


@pytest.fixture(scope="session")
def tight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The same without room for padding behind the last token: a step that writes there fails."""
    with built(tmp_path_factory, slack=0) as engine:
        yield engine


@pytest.fixture(scope="session")
def maskless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The same without a mask."""
    with built(tmp_path_factory, mask=False) as engine:
        yield engine
