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

    from ryzen_compile.spec.passes import Inputs

RunFunction = Callable[["Inputs"], "Inputs"]
"""Run once: arrays by input name in, arrays by output name out."""

OpenFunction = Callable[[], AbstractContextManager[RunFunction]]
"""Make something ready to run; it is let go with the block."""

SampleFactory = Callable[[int], Sequence["Inputs"]]
"""Feeds that mean something to a model, always the same ones for the same seed."""


def processor_name() -> str:
    """Return the name of this machine's processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] else platform.processor() or platform.machine() or "a processor without a name"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One side of a comparison."""

    name: str
    """How the user spells it: `model.ryzen@fp16`, `model.onnx`, `my_model.py:make`."""
    description: str
    """What is really executed: `model.onnx, by ONNX Runtime 1.27.0`."""
    interface: Interface | None
    """None for a module that says nothing of its inputs: it takes those of what it is compared with."""
    open: OpenFunction
    """How to run it by the names of its interface."""
    open_positional: Callable[[Interface], OpenFunction] | None = None
    """For what has no names of its own, a PyTorch module: how to open it with the names of an interface."""
    precision: Precision = "fp32"
    """What it computes in, at its coarsest."""
    machine: str = field(default_factory=processor_name)
    """The processor or GPU that runs it."""
    profiles: tuple[Profile, ...] = ()
    """The shapes that it was built for; empty: any that its interface takes."""
    samples: SampleFactory | None = None
    """Its own data, where it has any."""
    portable: bool = False
    """Whether it is what others are compared with: a module, or a graph in fp32 that runs everywhere."""
    graph: str | None = None
    """The name of the package's graph that it is."""
    package_file: str | None = None
    """The file of the package that it is: a variant's graph or an engine."""
    not_executed: tuple[str, ...] = ()
    """What belongs to it and cannot be executed here, each with the reason."""


def as_float_type(array: np.ndarray[Any, Any], dtype: str | None) -> np.ndarray[Any, Any]:
    """Return a floating-point array in the floating-point type `dtype`; anything else as it is."""
    if dtype is None or array.dtype.name == dtype or {_dtype_kind(array.dtype.name), _dtype_kind(dtype)} != {"float"}:
        return array
    return array.astype(numpy_dtype(dtype))


def _dtype_kind(dtype: str) -> str:
    return "float" if dtype.startswith(("float", "bfloat")) else "other"


def match_interfaces(candidate: Candidate, baseline: Candidate) -> tuple[Candidate, Candidate, Interface]:
    """Return the two with names in common, and the contract of their inputs: all that either knows of what they mean.

    Raises ShapeError where they do not have the same inputs, UsageError where neither says what its inputs are.
    """
    one, other = candidate.interface, baseline.interface
    if other is not None and candidate.open_positional and (one is None or not baseline.open_positional):
        candidate, one = _with_input_names(candidate, other, candidate.open_positional), other
    elif one is not None and baseline.open_positional:
        baseline, other = _with_input_names(baseline, one, baseline.open_positional), one
    if one is None or other is None:
        raise UsageError(
            f"neither `{candidate.name}` nor `{baseline.name}` says what its inputs are",
            hint="let the function return (module, inputs), or compare with an ONNX file or a recipe",
        )
    mine, theirs = {spec.name for spec in one.inputs}, {spec.name for spec in other.inputs}
    if mine != theirs:
        raise ShapeError(
            f"`{candidate.name}` takes the inputs {_format_names(mine)}, `{baseline.name}` {_format_names(theirs)}",
            hint="compare models of one interface",
        )
    return candidate, baseline, _merge_interfaces(one, other)


def _merge_interfaces(interface: Interface, other: Interface) -> Interface:
    """Return `one` with what only `other` says of the same tensors and dimensions."""
    base = (
        interface if _has_input_semantics(interface) or not _has_input_semantics(other) else _copy_semantics(interface, other)
    )
    names = {dim for spec in base.inputs for dim in spec.dims or ()}

    def both(mine: dict[str, int], theirs: dict[str, int]) -> dict[str, int]:
        return {**{name: size for name, size in theirs.items() if name in names}, **mine}

    return msgspec.structs.replace(
        base,
        batch=base.batch or (other.batch if other.batch in names else None),
        task=base.task or other.task,
        typical_sizes=both(base.typical_sizes, other.typical_sizes),
        max_sizes=both(base.max_sizes, other.max_sizes),
    )


def _with_input_names(
    candidate: Candidate, interface: Interface, open_positional: Callable[[Interface], OpenFunction]
) -> Candidate:
    """Return what goes by order with the names of `interface`; samples that have these names already keep them."""
    names = [spec.name for spec in interface.inputs]
    own = candidate.samples

    def renamed(feed: Inputs) -> Inputs:
        return feed if set(feed) == set(names) else dict(zip(names, feed.values(), strict=True))

    return replace(
        candidate,
        interface=interface,
        open=open_positional(interface),
        open_positional=None,
        samples=(lambda seed: [renamed(feed) for feed in own(seed)]) if own else None,
    )


def _has_input_semantics(interface: Interface) -> bool:
    """Return whether an interface says more of its inputs than their types and sizes."""
    return interface.batch is not None or any(
        spec.role != "values" or spec.low is not None or spec.high is not None for spec in interface.inputs
    )


def _copy_semantics(interface: Interface, other: Interface) -> Interface:
    """Return `interface` with what `other` says of the same tensors; types, and sizes that are fixed, are its own."""
    outputs = {spec.name: spec for spec in other.outputs}
    return msgspec.structs.replace(
        other,
        inputs=tuple(
            msgspec.structs.replace(other.input(spec.name), dtype=spec.dtype, dims=_merge_dims(spec, other.input(spec.name)))
            for spec in interface.inputs
        ),
        outputs=tuple(
            msgspec.structs.replace(spec, dims=_merge_dims(spec, outputs[spec.name])) if spec.name in outputs else spec
            for spec in interface.outputs
        ),
    )


def _merge_dims(spec: TensorSpec, other: TensorSpec) -> tuple[Dim, ...] | None:
    """Return the dimensions as `other` names them; sizes that are fixed on either side stay fixed."""
    if spec.dims is None or other.dims is None or len(spec.dims) != len(other.dims):
        return spec.dims
    return tuple(mine if isinstance(mine, int) else theirs for mine, theirs in zip(spec.dims, other.dims, strict=True))


def _format_names(names: set[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names)) or "none"
