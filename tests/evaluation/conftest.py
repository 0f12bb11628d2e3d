"""Fixture: a tiny decoder with evicting caches, as ONNX files and as a package."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import tiny_decoder_evaluation
from support.decoders import export

import ryzen_compile as rc
from ryzen_compile.cli.main import run


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `one.onnx` (steps of one token), `any.onnx` (steps of any size) and `one.ryzen`, built from the first."""
    folder = tmp_path_factory.mktemp("evaluated")
    source = str(export("llama", "optimum-sdpa"))
    for name, step, score in (("one", 1, "value-norm"), ("any", 0, "position")):
        assert (
            run(["rewrite", source, str(folder / f"{name}.onnx"), "--passes", tiny_decoder_evaluation.passes(step, score)]) == 0
        )
    rc.build(folder / "one.onnx", gpu="cpu", compare=False, cache=False)
    return folder
