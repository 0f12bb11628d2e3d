"""A recipe: a module, how to export it, and the data that means something to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ryzen_compile.spec.interface import Interface

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ryzen_compile.spec.passes import Inputs


@dataclass(frozen=True, kw_only=True)
class Question:
    """Something that a decoder is asked, and what it should go on with."""

    prompt: np.ndarray[Any, Any]
    """(tokens,) ids."""
    answer: np.ndarray[Any, Any]
    """(tokens,) ids: right is who goes on with exactly these, greedily."""
    depth: float
    """Where in the prompt the answer is to be found, in 0..1: 0 is its beginning."""
    distance: int
    """How many tokens lie between that and the end of the prompt."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Questions of one kind."""

    name: str
    """One word, as `--require` spells it: `needle`."""
    description: str
    make_question: Callable[[int], Question]
    """Make a question, always the same one for the same seed. Prompts of few lengths are answered together, and faster."""


@dataclass(frozen=True, kw_only=True)
class EvaluationData:
    """What a decoder is evaluated on: see `ryzen_compile.evaluate`."""

    streams: Callable[[int], Iterable[np.ndarray[Any, Any]]]
    """Yield documents, (tokens,) ids each, always the same ones for the same seed; there may be no end of them."""
    tasks: tuple[Task, ...] = ()
    calibration: Callable[[int], Iterable[np.ndarray[Any, Any]]] | None = None
    """Yield documents to calibrate on, as `streams` does, of other text."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One graph of a model: what `ryzen-compile export NAME` exports and what everything later compares with.

    `samples` yields feeds that mean something, always the same ones for the same seed; the first also serves as the example
    that the exporter traces.
    """

    name: str
    description: str
    """What it is, in one line: the architecture, its size and where its weights come from."""
    make_module: Callable[[], torch.nn.Module]
    """Make the module, in eval mode. It takes the inputs in order, as tensors, and returns the outputs in order."""
    interface: Interface
    samples: Callable[[int], Iterable[Inputs]]
    """Yield feeds, given a seed."""
    max_abs: float
    """The largest absolute difference from the module that the exported graph may show in any output, in float32."""
    opset: int = 23
    evaluation: EvaluationData | None = None
    """Of a decoder: text and questions that it is evaluated on. Its module then is, or holds, a causal language model of
    transformers."""
