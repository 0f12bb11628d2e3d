"""Candidate: one side of a comparison, with what is executed when it runs; and how two candidates get a common interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ryzen_compile.artifacts.package.manifest import AccuracyFloor
from ryzen_compile.errors import ShapeError, UsageError
from ryzen_compile.spec.dims import Dim
from ryzen_compile.spec.dtypes import Precision, numpy_dtype
from ryzen_compile.spec.interface import Inputs, Interface, RunFunction, TensorSpec
from ryzen_compile.spec.profile import Profile
from ryzen_compile.utils.machine import processor_name

if TYPE_CHECKING:
    import numpy as np


OpenFunction = Callable[[], AbstractContextManager[RunFunction]]
"""Open a candidate for running; its resources are released when the context ends."""

SampleFactory = Callable[[int], Sequence["Inputs"]]
"""Return realistic samples; the same seed returns the same samples."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """The candidate or the baseline of a comparison: a graph or engine of a package, an ONNX file or a PyTorch module."""

    name: str
    """The reference that the user gives: `model.ryzen@fold+attention`, `model.onnx`, `my_model.py:make`."""
    description: str
    """What is executed, without the folders of this machine: `model.onnx, by ONNX Runtime 1.27.0`."""
    interface: Interface | None
    """None for a module that does not declare its inputs; it uses the interface of the other side."""
    open: OpenFunction
    """Open it for running by the names of its interface."""
    open_positional: Callable[[Interface], OpenFunction] | None = None
    """For a PyTorch module without tensor names of its own: return how to open it with the names of an interface."""
    precision: Precision = "fp32"
    """The coarsest precision that it computes in."""
    machine: str = field(default_factory=processor_name)
    """The processor or GPU that runs it."""
    profiles: tuple[Profile, ...] = ()
    """The shapes that it was built for; empty: every shape that its interface allows."""
    samples: SampleFactory | None = None
    """Its own samples, if it has any."""
    can_be_baseline: bool = False
    """Whether it serves as a baseline: a module, or a graph in fp32 that runs on any machine."""
    graph: str | None = None
    """The name of its graph in the package."""
    model_file: Path | None = None
    """The ONNX file that it runs or was compiled from; None for a PyTorch module."""
    package_file: str | None = None
    """Its file in the package: a variant's graph or an engine."""
    accuracy_floor: AccuracyFloor | None = None
    """What its lossy passes may cost against the source; None: it has none."""
    not_executed: tuple[str, ...] = ()
    """Engines built from it that cannot be executed here, each with the reason."""


def as_float_type(array: np.ndarray[Any, Any], dtype: str | None) -> np.ndarray[Any, Any]:
    """Return a floating-point array cast to the floating-point type `dtype`; any other array is returned unchanged."""
    if dtype is None or array.dtype.name == dtype or {_dtype_kind(array.dtype.name), _dtype_kind(dtype)} != {"float"}:
        return array
    return array.astype(numpy_dtype(dtype))


def _dtype_kind(dtype: str) -> str:
    return "float" if dtype.startswith(("float", "bfloat")) else "other"


def _input_names_hint(candidate: Candidate, baseline: Candidate) -> str:
    """Return the hint for models with other input names; decoders whose caches differ are compared by what they compute."""
    if all(model.interface is not None and model.interface.states for model in (candidate, baseline)):
        options = f"{candidate.name.partition('#')[0]} --baseline {baseline.name} --data FILE.txt"
        return f"their caches differ: compare what decoders compute with ryzen-compile evaluate {options}"
    return "compare models with the same input names"


def match_interfaces(candidate: Candidate, baseline: Candidate) -> tuple[Candidate, Candidate, Interface]:
    """Return both candidates with common input names, and their common interface with the input semantics of either.

    Raises ShapeError if their inputs differ, UsageError if neither declares its inputs.
    """
    own, other = candidate.interface, baseline.interface
    if other is not None and candidate.open_positional and (own is None or not baseline.open_positional):
        candidate, own = _with_input_names(candidate, other, candidate.open_positional), other
    elif own is not None and baseline.open_positional:
        baseline, other = _with_input_names(baseline, own, baseline.open_positional), own
    if own is None or other is None:
        raise UsageError(
            f"neither `{candidate.name}` nor `{baseline.name}` declares its inputs",
            hint="return (module, inputs) from the function, or compare with an ONNX file or a recipe",
        )
    own_names, other_names = {spec.name for spec in own.inputs}, {spec.name for spec in other.inputs}
    if own_names != other_names:
        raise ShapeError(
            f"`{candidate.name}` takes the inputs {_format_names(own_names)}, "
            f"`{baseline.name}` takes {_format_names(other_names)}",
            hint=_input_names_hint(candidate, baseline),
        )
    return candidate, baseline, _merge_interfaces(own, other)


def _merge_interfaces(interface: Interface, other: Interface) -> Interface:
    """Return `interface` with what only `other` declares about the same tensors and dimensions."""
    base = (
        interface if _has_input_semantics(interface) or not _has_input_semantics(other) else _copy_semantics(interface, other)
    )
    dim_names = {dim for spec in base.inputs for dim in spec.dims or ()}

    def merge(sizes: dict[str, int], other_sizes: dict[str, int]) -> dict[str, int]:
        return {**{name: size for name, size in other_sizes.items() if name in dim_names}, **sizes}

    return msgspec.structs.replace(
        base,
        batch=base.batch or (other.batch if other.batch in dim_names else None),
        task=base.task or other.task,
        typical_sizes=merge(base.typical_sizes, other.typical_sizes),
        max_sizes=merge(base.max_sizes, other.max_sizes),
    )


def _with_input_names(
    candidate: Candidate, interface: Interface, open_positional: Callable[[Interface], OpenFunction]
) -> Candidate:
    """Return a positional candidate with the input names of `interface`; samples that use these names keep their order."""
    names = [spec.name for spec in interface.inputs]
    make_samples = candidate.samples

    def rename(sample: Inputs) -> Inputs:
        return sample if set(sample) == set(names) else dict(zip(names, sample.values(), strict=True))

    return replace(
        candidate,
        interface=interface,
        open=open_positional(interface),
        open_positional=None,
        samples=(lambda seed: [rename(sample) for sample in make_samples(seed)]) if make_samples else None,
    )


def _has_input_semantics(interface: Interface) -> bool:
    """Return whether an interface declares more about its inputs than types and sizes."""
    return interface.batch is not None or any(
        spec.role != "values" or spec.low is not None or spec.high is not None for spec in interface.inputs
    )


def _copy_semantics(interface: Interface, other: Interface) -> Interface:
    """Return `other` with the element types and the static sizes of `interface`."""
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
    """Return the dimensions with the names of `other`; a size that is static on either side stays static."""
    if spec.dims is None or other.dims is None or len(spec.dims) != len(other.dims):
        return spec.dims
    return tuple(dim if isinstance(dim, int) else other_dim for dim, other_dim in zip(spec.dims, other.dims, strict=True))


def _format_names(names: set[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names)) or "none"
