"""Calibration samples of a build: the user's, otherwise short texts, otherwise values drawn from a seed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from ryzen_compile.builder.graph_samples import MAX_KEPT_BYTES, STEP_TOKENS, decoder_steps, graph_samples
from ryzen_compile.data.synthetic import synthesize
from ryzen_compile.spec.dims import dim_names
from ryzen_compile.spec.interface import Inputs, Interface
from ryzen_compile.spec.profile import InputShapes, Profile, input_shapes
from ryzen_compile.text.sample_texts import TEXTS
from ryzen_compile.text.tokenizer import TextTokenizer

if TYPE_CHECKING:
    import onnx_ir as ir

_SAMPLES = 4
"""The number of samples of a model that reads no tokens."""
_TOKENS = 2 * STEP_TOKENS
"""The number of tokens to measure in all samples together."""
_MIN_TOKEN_SAMPLES, _MAX_TOKEN_SAMPLES = 2, 64


@dataclass(frozen=True, kw_only=True)
class CalibrationSamples:
    """Samples for passes that measure a graph."""

    samples: Sequence[Inputs]
    origin: Literal["given", "texts", "random"]
    """As `PassContext.samples_origin`."""


def calibration_samples(
    interface: Interface,
    profile: Profile,
    *,
    data: str | None,
    graph: Path,
    seed: int,
    tokenizer: TextTokenizer | None = None,
) -> CalibrationSamples:
    """Return the samples of `data` for the graph in the file `graph`, otherwise short texts, otherwise random values.

    Texts are used if the graph reads tokens of `tokenizer`. Without them, values are drawn from `seed`. Inputs have the opt
    shapes of `profile`; rows of tokens have up to 256 tokens if the profile allows it, and there are as many samples as it
    takes to measure 512 tokens, at most 64, and at most 512 MB of them. Texts are repeated where a step of a decoder is longer.
    """
    if data is not None:
        return CalibrationSamples(samples=graph_samples(data, interface, profile, graph, seed=seed), origin="given")
    ids = [spec for spec in interface.inputs if spec.role == "ids"]
    if tokenizer is None or not ids or (ids[0].high is not None and tokenizer.vocab_size > ids[0].high + 1):
        return CalibrationSamples(samples=_random_samples(interface, profile, seed), origin="random")
    streams = [tokenizer.encode("\n\n".join(texts)) for texts in (TEXTS, TEXTS[::-1])]
    shortest_step = math.prod(profile.min[ids[0].name][1:])
    long_streams = [np.resize(stream, max(len(stream), shortest_step)) for stream in streams]  # repeats the texts
    if (steps := decoder_steps(interface, profile, graph, long_streams)) is not None:
        return CalibrationSamples(samples=steps, origin="texts")
    tokens = itertools.cycle(np.concatenate(streams).tolist())

    def with_text(sample: Inputs) -> Inputs:
        array = sample[ids[0].name]
        text = np.array(list(itertools.islice(tokens, array.size)), array.dtype)
        return {**sample, ids[0].name: text.reshape(array.shape)}

    samples = [with_text(sample) for sample in _random_samples(interface, profile, seed)]
    return CalibrationSamples(samples=samples, origin="texts")


def text_tokenizer(model: ir.Model, path: Path) -> TextTokenizer | None:
    """Return the tokenizer of `model`, which was loaded from `path`; None if it has none.

    Raises ModelError if its files are missing or were changed, RyzenError if the library `tokenizers` is not installed.
    """
    from ryzen_compile.ir.text_files import read_text_files

    files = read_text_files(model, path)
    return TextTokenizer(files, source=path.name) if files else None


def calibration_shapes(interface: Interface, profile: Profile) -> InputShapes:
    """Return the opt shapes of `profile`, with rows of up to 256 tokens as far as the profile allows."""
    token_axes = {spec.name: spec.dims[-1] for spec in interface.inputs if spec.role == "ids" and spec.dims}
    sizes: dict[str, int] = {}
    for spec in interface.inputs:
        for axis, dim in enumerate(spec.dims or ()):
            if isinstance(dim, str) and dim_names(dim) == (dim,):
                sizes[dim] = profile.opt[spec.name][axis]
    for name, dim in token_axes.items():
        if isinstance(dim, str) and dim in sizes:
            sizes[dim] = min(max(sizes[dim], STEP_TOKENS), profile.max[name][-1])
    shapes = {**profile.opt, **input_shapes(interface, sizes)}
    return shapes if profile.mismatch(shapes) is None else profile.opt


def _random_samples(interface: Interface, profile: Profile, seed: int) -> list[Inputs]:
    """Return samples drawn from `seed`: enough to measure 512 tokens, at most `MAX_KEPT_BYTES` of them, and at least one."""
    shapes = calibration_shapes(interface, profile)
    first = synthesize(interface, shapes, seed=seed, rows="mixed")
    largest_count = max(1, MAX_KEPT_BYTES // max(1, sum(array.nbytes for array in first.values())))
    count = min(_sample_count(interface, shapes), largest_count)
    return [first, *(synthesize(interface, shapes, seed=seed + index, rows="mixed") for index in range(1, count))]


def _sample_count(interface: Interface, shapes: InputShapes) -> int:
    tokens = max((math.prod(shapes[spec.name]) for spec in interface.inputs if spec.role == "ids"), default=0)
    if not tokens:
        return _SAMPLES
    return min(max(math.ceil(_TOKENS / tokens), _MIN_TOKEN_SAMPLES), _MAX_TOKEN_SAMPLES)
