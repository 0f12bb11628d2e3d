"""Calibration: fit the statistics that a pass needs to an exported decoder and write them to a file."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ryzen_compile import registry
from ryzen_compile.builder.calibration_samples import text_tokenizer
from ryzen_compile.data.documents import documents_from_samples
from ryzen_compile.diagnostic import Diagnostic
from ryzen_compile.errors import ModelError, UsageError
from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.ir.load import load
from ryzen_compile.ir.output_path import check_statistics_output
from ryzen_compile.pipeline.parser import parse
from ryzen_compile.processes.child_call import call_in_child
from ryzen_compile.processes.limits import ResourceLimits
from ryzen_compile.progress import Progress, StageItems, counted
from ryzen_compile.spec.pass_abilities import Calibratable
from ryzen_compile.utils.amounts import amount
from ryzen_compile.utils.atomic_file import remove_stale_files
from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    import numpy as np

    from ryzen_compile.spec.interface import Interface
    from ryzen_compile.text.tokenizer import TextTokenizer


def calibrate(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    pass_spec: str,
    data: str,
    documents: int = 64,
    seed: int = 0,
    limits: ResourceLimits | None = None,
    progress: Progress | None = None,
) -> str:
    """Fit the statistics for the pass `pass_spec` to the ONNX file `model`, write them to `output`, and return a summary.

    The model runs in a child process within `limits`.

    `pass_spec` is written as in a pipeline: `kv-evict{score=kvzap}`. `data` is `recipe:NAME`, for the calibration documents
    of the recipe's evaluation, or a reference to samples: token ids of shape (documents, tokens) by the name of the ids
    input. At most `documents` (at least 1) documents are used; `seed` selects those of a recipe. Raises UsageError for an
    unsuitable pass or unsuitable data, ModelError if the model is not a suitable decoder; nothing is written in that case.
    """
    call = _CalibrateCall(
        model=os.fspath(model), output=os.fspath(output), pass_spec=pass_spec, data=data, documents=documents, seed=seed
    )
    try:
        encoded = call_in_child(
            f"{__name__}:{_calibrate_encoded.__name__}",
            msgspec.json.encode(call),
            label=f"calibration of {call.model}",
            preload=(__name__, "ryzen_compile.pipeline.range_measurement"),
            limits=limits,
            progress=progress,
        )
    except BaseException:
        remove_stale_files(Path(output))
        raise
    return msgspec.json.decode(encoded, type=str)


class _CalibrateCall(Record, frozen=True):
    """The arguments of `calibrate` for a child process."""

    model: str
    output: str
    pass_spec: str
    data: str
    documents: int
    seed: int


def _calibrate_encoded(argument: bytes, progress: Progress) -> bytes:
    """Perform an encoded `_CalibrateCall`; the function that the child process calls."""
    call = msgspec.json.decode(argument, type=_CalibrateCall)
    passes = parse(call.pass_spec)
    if len(passes) != 1:
        raise UsageError(
            f"`pass_spec` must name exactly one pass (got {len(passes)} in `{call.pass_spec}`)",
            hint="calibrate for one pass, such as kv-evict{score=kvzap}",
        )
    calibratable = passes[0]
    if not isinstance(calibratable, Calibratable):
        raise UsageError(f"the pass `{passes[0].name}` takes no statistics", hint="`passes` lists the options of each pass")
    if call.documents < 1:
        raise UsageError(f"`documents` must be at least 1 (got {call.documents})")
    check_statistics_output(call.output, source=call.model)
    graph = load(call.model)
    make_documents = _document_source(call.data, interface_of(graph), lambda: text_tokenizer(graph, Path(call.model)))
    documents = list(itertools.islice(make_documents(call.seed), call.documents))
    lengths = tuple(len(document) for document in documents)
    message = f"fits statistics to {amount(len(documents), 'document')}, {amount(sum(lengths), 'token')} in total"
    progress.report(Diagnostic(code="calibration-started", severity="info", message=message, location=Path(call.model).name))
    with progress.stage("calibrate", StageItems("documents", len(documents), lengths)) as stage:
        summary = calibratable.calibrate(graph, counted(documents, stage), call.output)
    return msgspec.json.encode(summary)


def _document_source(
    data: str, interface: Interface, find_tokenizer: Callable[[], TextTokenizer | None]
) -> Callable[[int], Iterable[np.ndarray[Any, Any]]]:
    if registry.is_recipe_reference(data):
        recipe = registry.find_recipe(data)
        if recipe.evaluation is None or recipe.evaluation.calibration is None:
            raise UsageError(
                f"the recipe `{recipe.name}` has nothing to calibrate on", hint="give documents: FILE.npz or FILE.txt"
            )
        return recipe.evaluation.calibration
    ids = [spec for spec in interface.inputs if spec.role == "ids"]
    if len(ids) != 1:
        raise ModelError(
            f"the model must have exactly one input with the role `ids` (got {len(ids)})",
            hint="calibrate a decoder with one such input: input_ids (batch, seq)",
        )
    return documents_from_samples(data, ids[0], find_tokenizer)
