"""The contract of a pass: what it needs, what it leaves behind, what it costs, what it does."""

from __future__ import annotations

import abc
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from ryzen_compile.errors import UsageError
from ryzen_compile.progress import Progress, SilentProgress
from ryzen_compile.spec.interface import Interface
from ryzen_compile.spec.properties import Property

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    import torch

    from ryzen_compile.spec.kv_cache import KVCacheSpec
    from ryzen_compile.spec.target import Target
    from ryzen_compile.utils.record import Record

Inputs = Mapping[str, "np.ndarray[Any, Any]"]
"""One sample: an array for each input, by name."""


@dataclass(frozen=True, kw_only=True)
class ValueRange:
    """What a tensor was seen to hold over the calibration samples."""

    low: float
    high: float

    @property
    def magnitude(self) -> float:
        """The largest absolute value."""
        return max(abs(self.low), abs(self.high))


MeasureRanges = Callable[["ir.Model", Sequence[Inputs]], Mapping[str, ValueRange]]
"""Run a model on samples and return the range of every floating-point tensor of its main graph, by name."""


@dataclass(frozen=True, kw_only=True)
class PassContext:
    """What a pass may know besides the model."""

    backend: str
    """The backend that the result is for: `onnxruntime`, `tensorrt-rtx`, `tensorrt`."""
    targets: tuple[Target, ...] = ()
    interface: Interface | None = None
    samples: Sequence[Inputs] = ()
    """Calibration samples; may be empty."""
    measure_ranges: MeasureRanges | None = None
    """How to measure ranges; None where nothing can run the model here."""
    seed: int = 0
    progress: Progress = field(default_factory=SilentProgress)


@dataclass(frozen=True, kw_only=True)
class PassEstimate:
    """What a pass is expected to change, before anything is built."""

    weight_bytes: int = 0
    """Bytes of weights gained (negative: saved)."""
    state_bytes: int = 0
    """Bytes of states gained at the largest shapes (negative: saved)."""
    nodes: int = 0
    """Nodes gained (negative: removed)."""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a pass did, by the names of the nodes it touched. A change that is false did nothing, and says why."""

    inserted: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    summary: str = ""
    """One sentence: what was done, or why there was nothing to do."""
    notes: tuple[str, ...] = ()
    """Places that were left alone, each with its reason: "/enc/3: head size 36 has no fused kernel"."""

    def __bool__(self) -> bool:
        return bool(self.inserted or self.removed or self.changed)


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why a pass cannot apply to this model."""

    reason: str
    location: str
    """The node or tensor that stands in the way."""
    hint: str | None = None


class Pass(abc.ABC):
    """A graph rewrite: a frozen dataclass whose fields are its options.

    A subclass states in `requires`, `ensures` and `breaks` what it does to the facts of a model; the runner checks each of
    them on the model before and after. `version` goes up with every change of what `rewrite` writes: it is part of the cache
    key of what is built.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    needs_calibration: ClassVar[bool] = False
    """Whether `rewrite` looks at the samples of its context; then they are part of the cache key."""
    changes_interface: ClassVar[bool] = False
    """Whether `rewrite` gives the model other inputs, outputs or states; then it runs before a build, not in it."""
    requires: ClassVar[frozenset[Property]] = frozenset()
    ensures: ClassVar[frozenset[Property]] = frozenset()
    invalidates: ClassVar[frozenset[Property]] = frozenset()

    @property
    def depends_on_node_names(self) -> bool:
        """Whether the options, as they are, choose nodes by name; then the names are part of the cache key."""
        return False

    @abc.abstractmethod
    def estimate(self, model: ir.Model, context: PassContext) -> PassEstimate:
        """Return the expected effect; must not modify `model`."""

    @abc.abstractmethod
    def rewrite(self, model: ir.Model, context: PassContext) -> Change | Refusal:
        """Rewrite `model` in place and say what was done; on a refusal `model` must be as it was."""

    @classmethod
    def inspect(cls, model: ir.Model) -> Record | None:
        """Return what the pass recognises in `model`, for people to look at; None where it has nothing to tell.

        `model` is left as it is. Raises ModelError where it is not what the pass is for.
        """
        return None

    def calibrate(self, model: ir.Model, streams: Iterable[np.ndarray[Any, Any]], path: str | os.PathLike[str]) -> str:
        """Fit to `model` what the pass, as its options are, takes from a file, write that to `path`, and say how well it fits.

        `streams` are sequences of ids, (tokens,) int64 each. Raises UsageError where the pass takes no such file, ModelError
        where the model is not what it is for.
        """
        raise UsageError(f"the pass {self.name} takes no statistics", hint="`passes` lists what each pass takes")

    @classmethod
    def torch_reference(
        cls, spec: KVCacheSpec, *, single_token: bool, module: torch.nn.Module | None = None
    ) -> Callable[[], Any] | None:
        """Return what makes empty caches for a decoder of transformers that keep what `told` says of a rewritten graph.

        With such a cache the module attends to what the graph attends to, fed the same steps: one row, or rows of equal
        lengths. `singles` is whether steps of one token are run by a graph that takes nothing else, which may attend to other
        rows than one of any number of tokens. None is returned where the pass did not make these caches.

        `module` is the decoder: some caches have to see what goes into its attention, and leave hooks there that do nothing
        while it runs with caches of other kinds. Raises ModelError where the pass made these caches and has no such form of
        them, or none without the module.
        """
        return None

    def __str__(self) -> str:
        options = [
            f"{field.name.replace('_', '-')}={_format_option(getattr(self, field.name))}"
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
            if getattr(self, field.name) != field.default
        ]
        return self.name + (f"{{{','.join(options)}}}" if options else "")


def _format_option(value: Any) -> str:
    """Return an option's value as `plan.spelling.parse` reads it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (tuple, list)):
        return f"[{','.join(map(_format_option, value))}]"
    text = str(value)
    return text if re.fullmatch(r'[^\s{}\[\],="\\]+', text) else json.dumps(text)
