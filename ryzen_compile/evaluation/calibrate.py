"""Calibrating: what a pass takes from a file of statistics, fitted to a decoder as it was exported."""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING

from ryzen_compile import registry
from ryzen_compile.errors import ModelError, UsageError
from ryzen_compile.evaluation.documents import documents_from_samples
from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.ir.load import load
from ryzen_compile.pipeline.parser import parse
from ryzen_compile.progress import Progress, SilentProgress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    import numpy as np

    from ryzen_compile.spec.interface import Interface


def calibrate(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    pass_spec: str,
    data: str,
    documents: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
) -> str:
    """Fit the statistics that the pass `for_pass` takes to the ONNX file `model`, write them, and say how well they fit.

    `for_pass` is spelt as in a list of passes: `kv-evict{score=kvzap}`. `data` is `recipe:NAME`, whose evaluation brings
    documents to calibrate on, or names samples: (documents, tokens) ids by the name of the input of ids; at most `documents` of
    them are taken. Raises UsageError for a pass or data that do not suit, ModelError for a model that is no such decoder, and
    then writes nothing.
    """
    progress = progress or SilentProgress()
    passes = parse(pass_spec)
    if len(passes) != 1:
        raise UsageError(f"`{pass_spec}` is {len(passes)} passes", hint="calibrate for one: kv-evict{score=kvzap}")
    if documents < 1:
        raise UsageError(f"`documents` is {documents}", hint="it must be at least 1")
    graph = load(model)
    streams = _document_source(data, interface_of(graph))
    with progress.stage("calibrate"):
        return passes[0].calibrate(graph, itertools.islice(streams(seed), documents), output)


def _document_source(data: str, interface: Interface) -> Callable[[int], Iterable[np.ndarray[Any, Any]]]:
    if data.startswith("recipe:"):
        recipe = registry.find_recipe(data.removeprefix("recipe:"))
        if recipe.evaluation is None or recipe.evaluation.calibration is None:
            raise UsageError(f"the recipe `{recipe.name}` brings nothing to calibrate on", hint="give documents: FILE.npz")
        return recipe.evaluation.calibration
    ids = [spec for spec in interface.inputs if spec.role == "ids"]
    if len(ids) != 1:
        raise ModelError(f"the model has {len(ids)} inputs of ids", hint="calibrate a decoder of one: input_ids (batch, seq)")
    return documents_from_samples(data, ids[0])
