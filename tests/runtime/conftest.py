"""Packages and engines of small models, built once per session."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from support import tiny_decoder, tiny_models

import ryzen_compile as rc
from ryzen_compile.artifacts.package.read import Package
from ryzen_compile.runtime.load import Engine


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    """A package of the model in `support.tiny_models` with a portable variant and an engine for sm89."""
    return rc.build(
        tiny_models.write(tmp_path_factory.mktemp("runtime") / "small.onnx"),
        gpu="cpu,sm89",
        max_shapes=["x:8x16"],
        min_shapes=["x:1x16"],
        compare=False,
        cache=False,
    )


def build_and_load(factory: pytest.TempPathFactory, **options: Any) -> Engine:
    source = tiny_decoder.write(factory.mktemp("decoder") / "tiny.onnx", **options)
    return rc.load(rc.build(source, gpu="cpu", compare=False, cache=False).path)


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A decoder whose caches are updated in place and have extra slots for padding."""
    with build_and_load(tmp_path_factory) as engine:
        yield engine


@pytest.fixture(scope="session")
def double_buffered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The same decoder with two buffers for each cache."""
    with build_and_load(tmp_path_factory, in_place=False) as engine:
        yield engine


@pytest.fixture(scope="session")
def no_slack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The same decoder without extra slots for padding: a step that writes beyond the capacity fails."""
    with build_and_load(tmp_path_factory, slack=0) as engine:
        yield engine


@pytest.fixture(scope="session")
def maskless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The same decoder without a mask input."""
    with build_and_load(tmp_path_factory, mask=False) as engine:
        yield engine
