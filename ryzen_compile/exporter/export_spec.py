"""The specification of an export: a module, its interface and its samples, from a recipe or from example inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from ryzen_compile.data.sources import Samples, from_recipe
from ryzen_compile.errors import UsageError
from ryzen_compile.exporter.dynamic_shapes import (
    DynamicAxes,
    check_dynamic,
    expand_patterns,
    interface_dynamic_axes,
    split_ranges,
)
from ryzen_compile.exporter.strategies import ExportRequest
from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.spec.dims import dim_names
from ryzen_compile.spec.interface import Inputs, InputSpec, Interface
from ryzen_compile.torch_module import LoadedModule, forward_arguments, infer_interface, load_module, suppress_output, to_torch

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from ryzen_compile.spec.recipe import Recipe

DEFAULT_OPSET = 23
"""The oldest opset with the ops Attention and RMSNormalization, so that torch exports each as one node."""


@dataclass(frozen=True, kw_only=True)
class ExportSpec:
    """The module to export and its metadata."""

    name: str
    module: torch.nn.Module
    interface: Interface
    """The interface as far as it is known before the export."""
    interface_declared: bool
    """Whether a recipe declares the interface; otherwise input roles and output sizes are inferred from the exported graph."""
    samples: Samples
    example_inputs: Inputs
    """The inputs with which torch traces the module."""
    opset: int
    max_abs: float | None
    """The maximum absolute deviation that the recipe declares."""
    text_files: Mapping[str, bytes]
    """The files of the tokenizer, {name: content}."""
    lacks_tokenizer: bool = False
    """Whether the recipe has a tokenizer for models that come with one, and this one does not."""

    def export_request(self, opset: int | None) -> ExportRequest:
        """Return the arguments for torch; `opset` overrides the default opset."""
        tensors = {spec.name: to_torch(self.example_inputs[spec.name]) for spec in self.interface.inputs}
        args, kwargs = forward_arguments(self.module, tensors)
        return ExportRequest(
            module=self.module,
            args=args,
            kwargs=kwargs,
            dynamic_axes=interface_dynamic_axes(self.interface),
            input_names=[spec.name for spec in self.interface.inputs],
            output_names=[spec.name for spec in self.interface.outputs],
            opset=opset or self.opset,
        )


def make_export_spec(model: str | Recipe | tuple[Any, Any], dynamic: DynamicAxes, *, seed: int) -> ExportSpec:
    """Create the module and determine its interface; raises UsageError if `model` or `dynamic` is invalid."""
    with suppress_output():
        loaded = load_module(model)
    if loaded.recipe is None:
        return _spec_from_sample(loaded, dynamic)
    recipe = loaded.recipe
    if dynamic:
        raise UsageError(f"recipe `{recipe.name}` declares its own dynamic dimensions", hint="omit --dynamic")
    samples = from_recipe(recipe, seed=seed)
    text_files = recipe.text_files() if recipe.text_files is not None else {}
    return ExportSpec(
        name=recipe.name,
        module=loaded.module,
        interface=recipe.interface,
        interface_declared=True,
        samples=samples,
        example_inputs=next(iter(samples)),
        opset=recipe.opset,
        max_abs=recipe.max_abs,
        text_files=text_files,
        lacks_tokenizer=recipe.text_files is not None and not text_files,
    )


def _spec_from_sample(loaded: LoadedModule, dynamic: DynamicAxes) -> ExportSpec:
    with suppress_output():
        inferred = infer_interface(loaded)
    sample = loaded.sample_inputs or {}
    dynamic, ranges = split_ranges(expand_patterns(dynamic, list(sample)))
    check_dynamic(dynamic, {name: array.ndim for name, array in sample.items()})
    typical_sizes: dict[str, int] = {}
    for name, axes in dynamic.items():
        for axis, dim in axes.items():
            size = sample[name].shape[axis]
            if typical_sizes.setdefault(dim, size) != size:
                raise UsageError(
                    f"dimension `{dim}` is {typical_sizes[dim]} and {size} in the sample inputs",
                    hint="use different names for dimensions of different sizes",
                )
    for dim, size_range in ranges.items():
        size = typical_sizes[dim]
        if not (size_range.low or 0) <= size <= (size if size_range.high is None else size_range.high):
            raise UsageError(
                f"dimension `{dim}` is {size} in the sample inputs, outside of its range {size_range}",
                hint="give a range that contains the size of the samples, or samples within the range",
            )
    interface = Interface(
        inputs=tuple(_with_dynamic_dims(spec, dynamic.get(spec.name, {})) for spec in inferred.inputs),
        outputs=inferred.outputs,
        typical_sizes={dim: size for dim, size in typical_sizes.items() if "+" not in dim},
        min_sizes={dim: size_range.low for dim, size_range in ranges.items() if size_range.low is not None},
        max_sizes={dim: size_range.high for dim, size_range in ranges.items() if size_range.high is not None},
    )
    return ExportSpec(
        name=loaded.name,
        module=loaded.module,
        interface=interface,
        interface_declared=False,
        samples=Samples(description="the sample inputs", interface=interface, read=lambda: [("the sample inputs", sample)]),
        example_inputs=sample,
        opset=DEFAULT_OPSET,
        max_abs=None,
        text_files={},
    )


def _with_dynamic_dims(spec: InputSpec, axes: Mapping[int, str]) -> InputSpec:
    return msgspec.structs.replace(spec, dims=tuple(axes.get(axis, dim) for axis, dim in enumerate(spec.dims or ())))


def complete_interface(export_spec: ExportSpec, model: ir.Model) -> Interface:
    """Return the complete interface of the exported `model`.

    If no recipe declares it, roles, integer ranges and states are inferred from the graph, and the range of each `values` input
    is that of its example, unless the example is constant. If a recipe declares a mask without its padding value, that is
    inferred.
    """
    declared = export_spec.interface
    if export_spec.interface_declared and not any(_lacks_padding_value(spec) for spec in declared.inputs):
        return declared
    inferred = interface_of(model)
    if export_spec.interface_declared:
        found = {spec.name: spec.padding_value for spec in inferred.inputs}
        return msgspec.structs.replace(
            declared,
            inputs=tuple(
                msgspec.structs.replace(spec, padding_value=found.get(spec.name)) if _lacks_padding_value(spec) else spec
                for spec in declared.inputs
            ),
        )
    return msgspec.structs.replace(
        inferred,
        inputs=tuple(_with_example_values(spec, export_spec.example_inputs, inferred) for spec in inferred.inputs),
        typical_sizes=export_spec.interface.typical_sizes,
        min_sizes=export_spec.interface.min_sizes,
        max_sizes=export_spec.interface.max_sizes,
    )


def _lacks_padding_value(spec: InputSpec) -> bool:
    return spec.role == "mask" and spec.padding_value is None


def _with_example_values(spec: InputSpec, examples: Inputs, interface: Interface) -> InputSpec:
    """Return `spec` with what the example shows about its values; an input with other values than 0 and 1 is no mask."""
    example = examples[spec.name]
    if spec.role == "mask" and example.dtype.kind in "iu" and not np.isin(example, (0, 1)).all():
        spec = msgspec.structs.replace(spec, role="values", low=None, high=None, padding_value=None)
    if (dim := _length_dim(spec, examples, interface)) is not None:
        return msgspec.structs.replace(spec, role="lengths", low=1, high=None, length_dim=dim)
    return _with_value_range(spec, example)


def _length_dim(spec: InputSpec, examples: Inputs, interface: Interface) -> str | None:
    """Return the dynamic dim whose elements an integer for each row counts: its size is the largest of the example's integers.

    None if the input is none of this kind, or several dims have that size.
    """
    example = examples[spec.name]
    if spec.role != "values" or example.dtype.kind not in "iu" or not example.size or not example.ndim or example.min() < 1:
        return None
    sizes = {
        dim: examples[other.name].shape[axis]
        for other in interface.inputs
        if other.dims and spec.dims and len(examples[other.name]) == len(example)
        for axis, dim in enumerate(other.dims[1:], 1)
        if isinstance(dim, str) and dim not in spec.dims and dim_names(dim) == (dim,)
    }
    if example.size != len(example) or example.max() < 2:
        return None
    matching = [dim for dim, size in sizes.items() if size == example.max()]
    return matching[0] if len(matching) == 1 else None


def _with_value_range(spec: InputSpec, example: Any) -> InputSpec:
    if spec.role != "values" or example.dtype.kind not in "iuf" or not example.size or example.min() == example.max():
        return spec
    return msgspec.structs.replace(spec, low=float(example.min()), high=float(example.max()))
