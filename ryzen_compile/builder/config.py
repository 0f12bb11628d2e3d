"""The configuration of a build, as requested by the user."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ryzen_compile.processes.limits import ResourceLimits

if TYPE_CHECKING:
    from ryzen_compile.spec.dtypes import Precision


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """What to build, as requested by the user."""

    gpu: str = "auto"
    """Comma-separated targets: `cpu`, `sm89`, `rtx4090`, `sm89@windows`, `auto`."""
    backend: str | None = None
    """The only backend to use; None: any backend that supports the target."""
    passes: str | Sequence[str] | None = None
    """One pipeline as text, `fold,attention,precision{to=fp16}`, or several, each of which makes a variant of every graph; the
    first is the default of the package. `none` is the pipeline without passes. None: the default passes of each backend."""
    precision: Precision | None = None
    """The element type that engines compute in; None: that of the model."""
    min_shapes: Sequence[str] = ()
    """One string per profile, in trtexec's syntax: `ids:1x8,mask:1x8`. The same applies to `opt_shapes` and `max_shapes`."""
    opt_shapes: Sequence[str] = ()
    max_shapes: Sequence[str] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    """Builder options by trtexec's names: {"builderOptimizationLevel": "5"}."""
    compare: bool = True
    """Whether to compare every variant with its source over the grid of profiles."""
    criteria: str | os.PathLike[str] | None = None
    """A success_criteria.toml; None: the project's default criteria."""
    accuracy_floor: str | None = None
    """What the lossy passes may cost together, as METRIC=FLOOR: `cosine=0.99`, against the source; None: no such limit."""
    baseline: str | None = None
    """A PyTorch module that every variant is compared with too: FILE.py:FUNCTION or recipe:NAME; None: the source only."""
    data: str | None = None
    """Samples for calibration and comparison: FILE.npz, FILE.py[:FUNCTION] or recipe:NAME; None: random values."""
    seed: int = 0
    limits: ResourceLimits = ResourceLimits()
