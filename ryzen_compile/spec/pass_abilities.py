"""Optional abilities of passes, as protocols: a pass has an ability if its class defines the methods of the protocol.

Users test an instance with `isinstance` and a class with `issubclass`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    import torch

    from ryzen_compile.spec.kv_cache import KVCacheSpec
    from ryzen_compile.spec.passes import Pass, PassContext
    from ryzen_compile.utils.record import Record


@runtime_checkable
class Inspectable(Protocol):
    """A pass that can display the structures that it recognizes in a model."""

    @classmethod
    def inspect(cls, model: ir.Model) -> Record:
        """Return the structures that the pass recognizes in `model`; must not modify `model`.

        Raises ModelError if the pass does not apply to the model.
        """


@runtime_checkable
class Calibratable(Protocol):
    """A pass that reads statistics from a file, which it fits to a model beforehand."""

    def calibrate(self, model: ir.Model, documents: Iterable[np.ndarray[Any, Any]], path: str | os.PathLike[str]) -> str:
        """Fit the statistics that the pass reads with its current options, write them to `path`, and summarize the fit.

        `documents` are sequences of token ids, (tokens,) int64 each. Raises UsageError if the pass reads no statistics with its
        current options, ModelError if it does not apply to the model.
        """


@runtime_checkable
class StepWidthAdjustable(Protocol):
    """A pass that fixes the number of tokens of a decoder step, so that it makes one step graph per width."""

    def with_step_width(self, width: int) -> Pass:
        """Return the pass with its current options and steps of `width` tokens; 0: any number of tokens."""


@runtime_checkable
class Tunable(Protocol):
    """A pass some of whose options trade accuracy for memory or speed, with the values that a tuner should try."""

    def search_space(self, model: ir.Model, context: PassContext) -> Mapping[str, Sequence[Any]]:
        """Return the values to try for each tuned option, by the name of the option's field; must not modify `model`.

        Each value is valid with the current values of the other options: the pass does not refuse `model` because of it. An
        option with a single valid value is left out. Raises ModelError if the pass does not apply to the model.
        """


@runtime_checkable
class TorchEquivalent(Protocol):
    """A pass whose method exists in PyTorch too, so that its rewrite is checked against an independent implementation."""

    def torch_equivalent(self, module: torch.nn.Module) -> torch.nn.Module:
        """Return `module` with the method of the pass and its current options applied; may modify `module`.

        The result takes the inputs of `module`. A build with a PyTorch baseline compares the rewritten graph with it under the
        numeric criteria: the same method must give the same numbers. Raises ModelError if the method does not apply.
        """


@runtime_checkable
class KVCacheReference(Protocol):
    """A pass that creates KV caches whose cache policy exists as a Transformers cache too."""

    @classmethod
    def torch_cache_factory(
        cls, spec: KVCacheSpec, *, single_token: bool, module: torch.nn.Module | None = None, statistics: Sequence[Path] = ()
    ) -> Callable[[], Any] | None:
        """Return a factory for empty Transformers caches that follow the cache policy in `spec`, or None.

        With such a cache, a Transformers decoder attends to the same tokens as the rewritten graph if it is fed the same
        steps: one row, or rows of equal lengths. `single_token` states whether steps of one token are run by a separate
        graph, which may attend to other tokens than a graph for any number of tokens. Returns None if the pass did not
        create the caches of `spec`, or if a later pass quantized them, which then returns the factory.

        `module` is the decoder. Some caches inspect the inputs of its attention layers through hooks, which remain on the
        module and do nothing while it runs with other caches. The statistics that `spec` refers to are searched by their
        digest in `statistics`: files, and folders that contain a file of the recorded name. Raises ModelError if the pass
        created the caches of `spec` but has no Transformers equivalent, needs `module` for it, or finds no statistics.
        """
