"""Tiny decoders that evict by any score: the pass, with statistics fitted to the decoder if the score is calibrated."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ryzen_compile.builder.calibrate import calibrate
from ryzen_passes.kv.evict import KvEvict
from ryzen_passes.kv.scoring import find_scorer
from support.decoders import VOCABULARY, export


def evict_by(score: str, architecture: str = "llama", **options: Any) -> KvEvict:
    """Return kv-evict with `score`, `options`, and the statistics of the exported decoder if the score takes any."""
    evict = KvEvict(score=score, **options)
    return replace(evict, statistics=str(statistics_file(score, architecture))) if find_scorer(score).is_calibrated() else evict


@functools.cache
def statistics_file(score: str, architecture: str) -> Path:
    """Return the statistics of a calibrated score, fitted to 12 random documents of 60 tokens."""
    path = _folder() / f"{architecture}.{score}"
    pass_spec = f"kv-evict{{score={score},recent-window=5}}"
    calibrate(export(architecture, "optimum-sdpa"), path, pass_spec=pass_spec, data=str(_documents()))
    return path


@functools.cache
def _documents() -> Path:
    path = _folder() / "ids.npz"
    np.savez(path, input_ids=np.random.default_rng(5).integers(0, VOCABULARY, (12, 60)))
    return path


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="statistics-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
