"""A subject: one thing that can be compared, and what is really executed when it runs."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ryzen_compile.errors import ShapeError, UsageError
from ryzen_compile.numerics.criteria import Precision
from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.spec.interface import Dim, Interface, TensorSpec
from ryzen_compile.spec.profile import Profile

if TYPE_CHECKING:
    import numpy as np

    from ryzen_compile.spec.passes import Feed

Run = Callable[["Feed"], "Feed"]
"""Run once: arrays by input name in, arrays by output name out."""

Open = Callable[[], AbstractContextManager[Run]]
"""Make something ready to run; it is let go with the block."""

Samples = Callable[[int], Sequence["Feed"]]
"""Feeds that mean something to a model, always the same ones for the same seed."""


def processor() -> str:
    """Return the name of this machine's processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] else platform.processor() or platform.machine() or "a processor without a name"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One side of a comparison."""

    name: str
    """How the user spells it: `model.ryzen@fp16`, `model.onnx`, `my_model.py:make`."""
    executed: str
    """What is really executed: `model.onnx, by ONNX Runtime 1.27.0`."""
    interface: Interface | None
    """None for a module that says nothing of its inputs: it takes those of what it is compared with."""
    open: Open
    """How to run it by the names of its interface."""
    by_order: Callable[[Interface], Open] | None = None
    """For what has no names of its own, a PyTorch module: how to open it with the names of an interface."""
    precision: Precision = "fp32"
    """What it computes in, at its coarsest."""
    where: str = field(default_factory=processor)
    """The processor or GPU that runs it."""
    profiles: tuple[Profile, ...] = ()
    """The shapes that it was built for; empty: any that its interface takes."""
    samples: Samples | None = None
    """Its own data, where it has any."""
    portable: bool = False
    """Whether it is what others are compared with: a module, or a graph in fp32 that runs everywhere."""
    graph: str | None = None
    """The name of the package's graph that it is."""
    part: str | None = None
    """The file of the package that it is: a variant's graph or an engine."""
    not_executed: tuple[str, ...] = ()
    """What belongs to it and cannot be executed here, each with the reason."""


def as_float_type(array: np.ndarray[Any, Any], dtype: str | None) -> np.ndarray[Any, Any]:
    """Return a floating-point array in the floating-point type `dtype`; anything else as it is."""
    if dtype is None or array.dtype.name == dtype or {_kind(array.dtype.name), _kind(dtype)} != {"float"}:
        return array
    return array.astype(numpy_dtype(dtype))


def _kind(dtype: str) -> str:
    return "float" if dtype.startswith(("float", "bfloat")) else "other"


def paired(subject: Subject, baseline: Subject) -> tuple[Subject, Subject, Interface]:
    """Return the two with names in common, and the contract of their inputs: all that either knows of what they mean.

    Raises ShapeError where they do not have the same inputs, UsageError where neither says what its inputs are.
    """
    one, other = subject.interface, baseline.interface
    if other is not None and subject.by_order and (one is None or not baseline.by_order):
        subject, one = _named_as(subject, other, subject.by_order), other
    elif one is not None and baseline.by_order:
        baseline, other = _named_as(baseline, one, baseline.by_order), one
    if one is None or other is None:
        raise UsageError(
            f"neither `{subject.name}` nor `{baseline.name}` says what its inputs are",
            hint="let the function return (module, inputs), or compare with an ONNX file or a recipe",
        )
    mine, theirs = {spec.name for spec in one.inputs}, {spec.name for spec in other.inputs}
    if mine != theirs:
        raise ShapeError(
            f"`{subject.name}` takes the inputs {_spell(mine)}, `{baseline.name}` {_spell(theirs)}",
            hint="compare models of one interface",
        )
    return subject, baseline, _contract(one, other)


def _contract(one: Interface, other: Interface) -> Interface:
    """Return `one` with what only `other` says of the same tensors and dimensions."""
    base = one if _says_more(one) or not _says_more(other) else _lent(one, other)
    names = {dim for spec in base.inputs for dim in spec.dims or ()}

    def both(mine: dict[str, int], theirs: dict[str, int]) -> dict[str, int]:
        return {**{name: size for name, size in theirs.items() if name in names}, **mine}

    return msgspec.structs.replace(
        base,
        batch=base.batch or (other.batch if other.batch in names else None),
        task=base.task or other.task,
        typical=both(base.typical, other.typical),
        largest=both(base.largest, other.largest),
    )


def _named_as(subject: Subject, interface: Interface, by_order: Callable[[Interface], Open]) -> Subject:
    """Return what goes by order with the names of `interface`; samples that have these names already keep them."""
    names = [spec.name for spec in interface.inputs]
    own = subject.samples

    def renamed(feed: Feed) -> Feed:
        return feed if set(feed) == set(names) else dict(zip(names, feed.values(), strict=True))

    return replace(
        subject,
        interface=interface,
        open=by_order(interface),
        by_order=None,
        samples=(lambda seed: [renamed(feed) for feed in own(seed)]) if own else None,
    )


def _says_more(interface: Interface) -> bool:
    """Return whether an interface says more of its inputs than their types and sizes."""
    return interface.batch is not None or any(
        spec.role != "values" or spec.low is not None or spec.high is not None for spec in interface.inputs
    )


def _lent(interface: Interface, other: Interface) -> Interface:
    """Return `interface` with what `other` says of the same tensors; types, and sizes that are fixed, are its own."""
    outputs = {spec.name: spec for spec in other.outputs}
    return msgspec.structs.replace(
        other,
        inputs=tuple(
            msgspec.structs.replace(other.input(spec.name), dtype=spec.dtype, dims=_dims(spec, other.input(spec.name)))
            for spec in interface.inputs
        ),
        outputs=tuple(
            msgspec.structs.replace(spec, dims=_dims(spec, outputs[spec.name])) if spec.name in outputs else spec
            for spec in interface.outputs
        ),
    )


def _dims(spec: TensorSpec, other: TensorSpec) -> tuple[Dim, ...] | None:
    """Return the dimensions as `other` names them; sizes that are fixed on either side stay fixed."""
    if spec.dims is None or other.dims is None or len(spec.dims) != len(other.dims):
        return spec.dims
    return tuple(mine if isinstance(mine, int) else theirs for mine, theirs in zip(spec.dims, other.dims, strict=True))


def _spell(names: set[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names)) or "none"
