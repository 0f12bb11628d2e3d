"""Recipes: a PyTorch module with its interface, sample inputs, export options and evaluation data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ryzen_compile.spec.interface import Inputs, Interface

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt for a decoder, with the expected continuation."""

    prompt: np.ndarray[Any, Any]
    """Token ids, (tokens,)."""
    answer: np.ndarray[Any, Any]
    """Token ids, (tokens,): the question is answered correctly if greedy decoding continues with exactly these."""
    depth: float
    """Position of the evidence for the answer in the prompt as a fraction, 0..1; 0 is the start of the prompt."""
    distance: int
    """Number of tokens between the evidence and the end of the prompt."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A generator of questions of one type."""

    name: str
    """Name of one word, as `--require` accepts it: `needle`."""
    description: str
    make_question: Callable[[int], Question]
    """Return a question, deterministically for a seed. Prompts of equal length are batched, so few lengths evaluate faster."""


@dataclass(frozen=True, kw_only=True)
class EvaluationData:
    """Documents and tasks to evaluate a decoder on: see `ryzen_compile.evaluate`."""

    documents: Callable[[int], Iterable[np.ndarray[Any, Any]]]
    """Yield documents as token ids, (tokens,) each, deterministically for a seed; the iterator may be infinite."""
    tasks: tuple[Task, ...] = ()
    calibration: Callable[[int], Iterable[np.ndarray[Any, Any]]] | None = None
    """Yield calibration documents in the form of `documents`, from different text."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One graph of a model: the module that `ryzen-compile export NAME` exports and that later stages compare with."""

    name: str
    description: str
    """One line: the architecture, its number of parameters and the origin of its weights."""
    make_module: Callable[[], torch.nn.Module]
    """Return the module in eval mode. It takes the inputs in order, as tensors, and returns the outputs in order."""
    interface: Interface
    samples: Callable[[int], Iterable[Inputs]]
    """Yield representative inputs, deterministically for a seed. The exporter traces the module on the first sample."""
    max_abs: float | None
    """The maximum absolute difference between an output of the exported graph and of the module, in float32; None: relative to
    the magnitude of the output, as the exporter defines it."""
    opset: int = 23
    evaluation: EvaluationData | None = None
    """Evaluation data of a decoder; requires that the module is, or contains, a causal language model of Transformers."""
    text_files: Callable[[], Mapping[str, bytes]] | None = None
    """Return the files of the tokenizer, {name: content}, which the exporter writes next to the graph; empty: there is none."""
