"""The interface of graph passes: required and ensured properties, estimates, rewrites and calibration."""

from __future__ import annotations

import abc
import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ryzen_compile.progress import Progress, SilentProgress
from ryzen_compile.spec.fidelity import Exact, Fidelity
from ryzen_compile.spec.interface import Inputs, Interface
from ryzen_compile.spec.options import files_by_option
from ryzen_compile.spec.properties import Property

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from ryzen_compile.spec.target import Target


@dataclass(frozen=True, kw_only=True)
class ValueRange:
    """The range of values that a tensor takes over the calibration samples."""

    low: float
    high: float

    @property
    def magnitude(self) -> float:
        """The largest absolute value."""
        return max(abs(self.low), abs(self.high))


MeasureRanges = Callable[["ir.Model", Sequence[Inputs]], Mapping[str, ValueRange]]
"""Function that runs a model on samples and returns the range of every floating-point tensor of its main graph, by name."""


MeasureSecondMoments = Callable[["ir.Model", Sequence[str], Sequence[Inputs]], Mapping[str, "np.ndarray[Any, Any]"]]
"""Function that runs a model on samples and returns, for each tensor (..., features) that is named, the sum of x^T x over its
rows x, (features, features) float64; rows of padding are left out."""


MeasureCosines = Callable[["ir.Model", Sequence[tuple[str, str]], Sequence[Inputs]], Sequence[float]]
"""Function that runs a model on samples and returns the mean cosine similarity of the rows of two tensors (..., features), for
each pair that is named; rows of padding are left out."""


@dataclass(frozen=True, kw_only=True)
class PassContext:
    """The context of a pass: the backend, the targets and the calibration data."""

    backend: str
    """The name of the backend that runs the rewritten model; its static facts are `backends.traits.find_traits(backend)`."""
    targets: tuple[Target, ...] = ()
    interface: Interface | None = None
    samples: Sequence[Inputs] = ()
    """Calibration samples; may be empty."""
    samples_origin: Literal["given", "texts", "random"] = "given"
    """Where `samples` come from: the user; short texts, read with the tokenizer of the model; or a seed, in which case they say
    little about the values of real inputs."""
    measure_ranges: MeasureRanges | None = None
    """Measures value ranges; None if no backend on this machine can run the model."""
    measure_second_moments: MeasureSecondMoments | None = None
    """Measures second moments of activations; None if no backend on this machine can run the model."""
    measure_cosines: MeasureCosines | None = None
    """Measures cosine similarities of activations; None if no backend on this machine can run the model."""
    seed: int = 0
    progress: Progress = field(default_factory=SilentProgress)


@dataclass(frozen=True, kw_only=True)
class PassEstimate:
    """The expected effect of a pass, computed before anything is built."""

    weight_bytes: int = 0
    """Change of the size of the weights in bytes (negative: smaller)."""
    state_bytes: int = 0
    """Change of the size of the states in bytes at the maximum shapes (negative: smaller)."""
    nodes: int = 0
    """Change of the number of nodes (negative: fewer)."""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Change:
    """The result of a rewrite: the names of the inserted, removed and changed nodes.

    A change without such nodes is false; its `summary` then states why the pass had nothing to do.
    """

    inserted: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    summary: str = ""
    """One sentence: what the pass did, or why it had nothing to do."""
    notes: tuple[str, ...] = ()
    """Nodes that were left unchanged, each with the reason: "/enc/3: head size 36 has no fused kernel"."""
    warnings: tuple[str, ...] = ()
    """What a user must know before relying on the result, each in one sentence; a build prints and records them."""
    unmet_hint: str | None = None
    """What to do if the model after the pass does not meet the criteria of a comparison."""

    def __bool__(self) -> bool:
        return bool(self.inserted or self.removed or self.changed)

    def then(self, later: Change) -> Change:
        """Return the effect of this change followed by `later`: a node that `later` removed is neither inserted nor changed.

        The summary is that of the changes that did something, or of `later` if neither did.
        """
        removed_later = {*later.removed}
        transient = {*self.inserted, *later.inserted} & removed_later
        inserted, removed = ((*self.inserted, *later.inserted), (*self.removed, *later.removed))
        changed = dict.fromkeys((*(name for name in self.changed if name not in removed_later), *later.changed))
        return Change(
            inserted=tuple(name for name in inserted if name not in transient),
            removed=tuple(name for name in removed if name not in transient),
            changed=tuple(changed),
            summary="; ".join(change.summary for change in (self, later) if change) or later.summary,
            notes=(*self.notes, *later.notes),
            warnings=(*self.warnings, *later.warnings),
            unmet_hint=later.unmet_hint or self.unmet_hint,
        )


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """The reason why a pass cannot be applied to a model."""

    reason: str
    location: str
    """The node or tensor that prevents the rewrite."""
    hint: str | None = None


class Pass(abc.ABC):
    """A graph pass: a frozen dataclass whose fields are its options.

    A subclass declares the properties that it requires, ensures and invalidates; the pass manager checks them on the model
    before and after the rewrite. The cache key of a build contains a digest of the package that defines the pass, so a change
    of its code is a cache miss. `pass_abilities` has the optional abilities of passes.
    """

    name: ClassVar[str]
    runs_before_legalization: ClassVar[bool] = False
    """Whether the pass runs before the legalization passes that a build adds for a backend. True for a pass that treats all
    element types and ops alike, such as the evaluation of constants, which is then done in the types of the model."""
    changes_interface: ClassVar[bool] = False
    """Whether `rewrite` changes the model's inputs, outputs or states; if so, the pass runs before a build, not within it."""
    requires: ClassVar[frozenset[Property]] = frozenset()
    ensures: ClassVar[frozenset[Property]] = frozenset()
    invalidates: ClassVar[frozenset[Property]] = frozenset()

    @property
    def depends_on_node_names(self) -> bool:
        """Whether the options select nodes by name; if so, node names are part of the cache key."""
        return False

    @property
    def needs_calibration(self) -> bool:
        """Whether `rewrite` uses the samples of its context, or their origin; if so, they are part of the cache key."""
        return False

    @property
    def fidelity(self) -> Fidelity:
        """What the pass does to accuracy with its current options; a build checks its output accordingly."""
        return Exact()

    @abc.abstractmethod
    def estimate(self, model: ir.Model, context: PassContext) -> PassEstimate | Refusal:
        """Return the expected effect of the pass, or why it would refuse `model`; must not modify `model`."""

    @abc.abstractmethod
    def rewrite(self, model: ir.Model, context: PassContext) -> Change | Refusal:
        """Rewrite `model` in place and return what changed; a rewrite that returns a refusal must leave `model` unchanged."""

    def __str__(self) -> str:
        options = [
            f"{field.name.replace('_', '-')}={_format_option(getattr(self, field.name))}"
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
            if getattr(self, field.name) != field.default
        ]
        return self.name + (f"{{{','.join(options)}}}" if options else "")


def recorded_spec(pass_: Pass) -> str:
    """Return `str(pass_)` for records that are shipped: files that options name are named without their folders."""
    names = {name: path.name for name, path in files_by_option(pass_).items()}
    return str(dataclasses.replace(pass_, **names) if names else pass_)  # type: ignore[type-var]


def _format_option(value: Any) -> str:
    """Return an option's value in the syntax that the pipeline parser reads."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (tuple, list)):
        return f"[{','.join(map(_format_option, value))}]"
    text = str(value)
    return text if re.fullmatch(r'[^\s{}\[\],="\\]+', text) else json.dumps(text)
