"""Calibration: run an exported decoder over documents, and fit statistics to its intermediate tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ryzen_compile.errors import ModelError, ShapeError
from ryzen_compile.ir.edit.builder import ModelInfo
from ryzen_compile.ir.edit.transaction import transaction
from ryzen_compile.ir.patterns import PatternNotMatched
from ryzen_compile.pipeline.range_measurement import capture
from ryzen_compile.spec.interface import InputSpec
from ryzen_compile.spec.passes import Refusal
from ryzen_passes.kv.recognition.recognize import recognize
from ryzen_passes.kv.recognition.recognized_decoder import RecognizedDecoder
from ryzen_passes.kv.scoring.estimators import Estimator
from ryzen_passes.kv.scoring.statistics import Statistics, StatisticsHeader, weights_digest
from ryzen_passes.kv.static.cache_view import StaticCacheView, read_static_cache_view
from ryzen_passes.kv.static.rewrite import make_static

Array = np.ndarray[Any, Any]

_PROBE_CAPACITY = 8
"""Capacity of the static caches that are created for inspection only."""


def calibrate(
    model: ir.Model,
    kind: str,
    make_estimators: Callable[[RecognizedDecoder, StaticCacheView], Sequence[Estimator]],
    documents: Iterable[Array],
    path: str | os.PathLike[str],
    *,
    recent_window: int,
    share: str = "explained variance",
) -> str:
    """Fit statistics to `model` on `documents` of token ids, write them to `path` and return a summary.

    `model` is a decoder as it is exported, and `make_estimators` returns one estimator per layer. Each document is one sequence
    of ids. Only queries at least `recent_window` tokens after a token count for it. The last eighth of each document is
    excluded, because too few queries follow its tokens; with a `recent_window` of 0 it is included. `share` is what the
    statistic of that name is called in the summary.

    Raises ModelError if `model` is not a decoder or does not suit the estimators, and ShapeError if the documents are too few
    or too short.
    """
    try:
        decoder = recognize(model)
    except PatternNotMatched as error:
        raise ModelError(f"`{error.location}`: {error.reason}", hint=error.hint) from None
    estimators = make_estimators(decoder, _static_view(model))
    tensor_names = list(dict.fromkeys(name for estimator in estimators for name in estimator.tensor_names))
    tokens = 0
    with capture(decoder.model, tensor_names) as run_decoder:
        for document in documents:
            ids = np.asarray(document, np.int64).reshape(1, -1)
            token_count = ids.shape[1] - (max(recent_window, ids.shape[1] // 8) if recent_window else 0)
            if token_count < 1:
                continue
            tokens += token_count
            outputs = run_decoder(_decoder_inputs(decoder, ids))
            for estimator in estimators:
                estimator.add([outputs[name] for name in estimator.tensor_names], recent_window, token_count)
            del outputs  # before the next document runs
    min_tokens = max(estimator.min_tokens for estimator in estimators) if tokens else 1
    if tokens < min_tokens:
        followed = " that are followed by later queries" if recent_window else ""
        raise ShapeError(
            f"{tokens} tokens{followed} are too few: `{kind}` needs at least {min_tokens}",
            hint=f"provide more documents of more than {recent_window} tokens",
        )
    solutions = [estimator.solve() for estimator in estimators]
    tensors = {f"{layer}.{name}": array for layer, solution in enumerate(solutions) for name, array in solution.items()}
    header = StatisticsHeader(
        kind=kind,
        model_fingerprint=weights_digest(decoder.model),
        layers=len(estimators),
        tokens=tokens,
        recent_window=recent_window,
    )
    Statistics(header, tensors).write(path)
    shares = [f"{float(solution['share']):.2f}" for solution in solutions if "share" in solution]
    return f"fitted to {tokens} tokens" + (f"; {share} per layer: {', '.join(shares)}" if shares else "")


def _static_view(model: ir.Model) -> StaticCacheView:
    """Return the static cache view of a copy of `model`; raises ModelError if its caches cannot be made static."""
    copy = model.clone()
    outcome = transaction(copy, lambda candidate: make_static(recognize(candidate), ModelInfo(candidate), _PROBE_CAPACITY))
    if isinstance(outcome, Refusal):
        raise ModelError(f"`{outcome.location}`: {outcome.reason}", hint=outcome.hint)
    return read_static_cache_view(copy)


def _decoder_inputs(decoder: RecognizedDecoder, ids: Array) -> dict[str, Array]:
    """Return the inputs of the decoder for a first step of `ids` (1, seq)."""
    return {spec.name: _input_array(decoder, spec, ids) for spec in decoder.interface.inputs}


def _input_array(decoder: RecognizedDecoder, spec: InputSpec, ids: Array) -> Array:
    if spec.name == decoder.ids.name:
        return ids.astype(spec.dtype)
    if spec.role == "mask":
        return np.full(ids.shape, spec.valid_value, spec.dtype)
    if spec.role == "positions":
        return np.arange(ids.shape[1])[None].astype(spec.dtype)
    state = next((state for state in decoder.interface.states if state.input == spec.name), None)
    if state is None or state.append_axis is None or spec.dims is None:
        raise ModelError(
            f"`{spec.name}` is not token ids, a mask, positions or a growing cache",
            hint="export the model again, with growing caches",
        )
    dims = [0 if axis == state.append_axis else dim for axis, dim in enumerate(spec.dims)]
    return np.zeros([1 if isinstance(dim, str) else dim for dim in dims], spec.dtype)
