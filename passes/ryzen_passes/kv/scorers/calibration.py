"""Calibrating: run a decoder, as it was exported, over streams of ids, and fit the statistics of a score to what it shows."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir

from ryzen_compile.errors import ModelError, ShapeError
from ryzen_compile.ir.edit.builder import ModelInfo
from ryzen_compile.pipeline.range_measurement import capture
from ryzen_compile.spec.interface import InputSpec
from ryzen_compile.spec.passes import Refusal
from ryzen_passes.kv.recognition.recognize import recognize
from ryzen_passes.kv.recognition.recognized_decoder import PatternNotMatched, RecognizedDecoder
from ryzen_passes.kv.scorers import SCORERS
from ryzen_passes.kv.scorers.statistics import Statistics, StatisticsHeader, fingerprint
from ryzen_passes.kv.static.cache_view import StaticCacheView, read_static_cache_view
from ryzen_passes.kv.static.rewrite import make_static
from ryzen_passes.kv.transaction import transaction

Array = np.ndarray[Any, Any]

_PROBE_CAPACITY = 8
"""Of the caches of fixed size that are made only to look at."""


def calibrate(model: ir.Model, score: str, streams: Iterable[Array], path: str | os.PathLike[str], recent_window: int) -> str:
    """Fit `score` to `model`, as it was exported, on `streams` of ids, write the statistics and say how well they fit.

    Only queries from `recent` tokens behind a token on count, and the last eighth of each stream is left out: it tells too
    little of its later queries.

    Raises ModelError for what is no decoder, or not one that the score is for; ShapeError where the streams are too few or too
    short.
    """
    try:
        decoder = recognize(model)
    except PatternNotMatched as why:
        raise ModelError(f"`{why.location}`: {why.reason}", hint=why.hint) from None
    fits = SCORERS[score].estimators(decoder, _static_view(model))
    run = capture(decoder.model, list(dict.fromkeys(name for fit in fits for name in fit.tensor_names)))
    tokens = 0
    for stream in streams:
        ids = np.asarray(stream, np.int64).reshape(1, -1)
        counted = ids.shape[1] - max(recent_window, ids.shape[1] // 8)
        if counted < 1:
            continue
        tokens += counted
        found = run(_decoder_inputs(decoder, ids))
        for fit in fits:
            fit.add([found[name] for name in fit.tensor_names], recent_window, counted)
    least = max(fit.min_tokens for fit in fits) if tokens else 1
    if tokens < least:
        raise ShapeError(
            f"{tokens} tokens with later ones behind them are too few: {score} takes {least}",
            hint=f"give more streams of over {recent_window} tokens",
        )
    solved = [fit.solve() for fit in fits]
    tensors = {f"{number}.{word}": array for number, one in enumerate(solved) for word, array in one.items()}
    told = StatisticsHeader(
        score=score, model_fingerprint=fingerprint(decoder.model), layers=len(fits), tokens=tokens, recent_window=recent_window
    )
    Statistics(told, tensors).write(path)
    shares = [f"{float(one['share']):.2f}" for one in solved if "share" in one]
    return f"fitted to {tokens} tokens" + (f"; share of the variance foretold, by layer: {', '.join(shares)}" if shares else "")


def _static_view(model: ir.Model) -> StaticCacheView:
    """Return the fixed form of a copy of `model`; raises ModelError where there is none."""
    copy = model.clone()
    outcome = transaction(copy, lambda one: make_static(recognize(one), ModelInfo(one), _PROBE_CAPACITY))
    if isinstance(outcome, Refusal):
        raise ModelError(f"`{outcome.location}`: {outcome.reason}", hint=outcome.hint)
    form = read_static_cache_view(copy)
    assert isinstance(form, StaticCacheView), form
    return form


def _decoder_inputs(decoder: RecognizedDecoder, ids: Array) -> dict[str, Array]:
    """Return what the decoder takes for a first step of `ids` (1, seq)."""
    return {spec.name: _input_array(decoder, spec, ids) for spec in decoder.interface.inputs}


def _input_array(decoder: RecognizedDecoder, spec: InputSpec, ids: Array) -> Array:
    if spec.name == decoder.ids.name:
        return ids.astype(spec.dtype)
    if spec.role == "mask":
        return np.ones(ids.shape, spec.dtype)
    if spec.role == "positions":
        return np.arange(ids.shape[1])[None].astype(spec.dtype)
    state = next((state for state in decoder.interface.states if state.input == spec.name), None)
    if state is None or state.append_axis is None or spec.dims is None:
        raise ModelError(f"`{spec.name}` is neither ids, a mask, positions nor a cache that grows", hint="export it anew")
    dims = [0 if axis == state.append_axis else dim for axis, dim in enumerate(spec.dims)]
    return np.zeros([1 if isinstance(dim, str) else dim for dim in dims], spec.dtype)
