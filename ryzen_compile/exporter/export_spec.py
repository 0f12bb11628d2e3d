"""The subject of an export: a module with its interface and its samples, declared by a recipe or read off an example."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from ryzen_compile.data.sources import Samples, from_recipe
from ryzen_compile.errors import UsageError
from ryzen_compile.exporter.dynamic_shapes import DynamicAxes, check_dynamic, interface_dynamic_axes
from ryzen_compile.exporter.strategies import ExportRequest
from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.spec.interface import InputSpec, Interface
from ryzen_compile.torch_module import LoadedModule, forward_arguments, infer_interface, load_module, suppress_output, to_torch

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from ryzen_compile.spec.passes import Inputs
    from ryzen_compile.spec.recipe import Recipe

DEFAULT_OPSET = 23
"""The oldest opset with Attention and RMSNormalization, so that torch writes them as one node each."""


@dataclass(frozen=True, kw_only=True)
class ExportSpec:
    """What is exported."""

    name: str
    module: torch.nn.Module
    interface: Interface
    """As far as it is known before the export."""
    interface_declared: bool
    """Whether a recipe declares the interface; else the graph tells the roles of its inputs and the sizes of its outputs."""
    samples: Samples
    example_inputs: Inputs
    """What the exporter traces."""
    opset: int
    max_abs: float | None
    """The bound that a recipe declares."""

    def export_request(self, opset: int | None) -> ExportRequest:
        """Return what to ask of torch; `opset` overrides the subject's."""
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
    """Make the module and find its interface; raises UsageError where `what` does not say enough."""
    with suppress_output():
        loaded = load_module(model)
    if loaded.recipe is None:
        return _spec_from_sample(loaded, dynamic)
    recipe = loaded.recipe
    if dynamic:
        raise UsageError(f"the recipe `{recipe.name}` declares its own dynamic dimensions", hint="leave --dynamic out")
    samples = from_recipe(recipe, seed=seed)
    return ExportSpec(
        name=recipe.name,
        module=loaded.module,
        interface=recipe.interface,
        interface_declared=True,
        samples=samples,
        example_inputs=next(iter(samples)),
        opset=recipe.opset,
        max_abs=recipe.max_abs,
    )


def _spec_from_sample(loaded: LoadedModule, dynamic: DynamicAxes) -> ExportSpec:
    with suppress_output():
        seen = infer_interface(loaded)
    sample = loaded.sample_inputs or {}
    check_dynamic(dynamic, {name: array.ndim for name, array in sample.items()})
    typical: dict[str, int] = {}
    for name, axes in dynamic.items():
        for axis, dim in axes.items():
            size = sample[name].shape[axis]
            if typical.setdefault(dim, size) != size:
                raise UsageError(f"`{dim}` is {typical[dim]} and {size} in the sample inputs", hint="give them two names")
    interface = Interface(
        inputs=tuple(_with_dynamic_dims(spec, dynamic.get(spec.name, {})) for spec in seen.inputs),
        outputs=seen.outputs,
        typical_sizes={dim: size for dim, size in typical.items() if "+" not in dim},
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
    )


def _with_dynamic_dims(spec: InputSpec, axes: Mapping[int, str]) -> InputSpec:
    return msgspec.structs.replace(spec, dims=tuple(axes.get(axis, dim) for axis, dim in enumerate(spec.dims or ())))


def complete_interface(export_spec: ExportSpec, model: ir.Model) -> Interface:
    """Return the whole interface of what was exported.

    Where no recipe declares it, roles, ranges of integers and states are what the graph shows, and the range of each float
    input that of its example, unless that is a constant.
    """
    if export_spec.interface_declared:
        return export_spec.interface
    seen = interface_of(model)
    return msgspec.structs.replace(
        seen,
        inputs=tuple(_with_value_range(spec, export_spec.example_inputs[spec.name]) for spec in seen.inputs),
        typical_sizes=export_spec.interface.typical_sizes,
    )


def _with_value_range(spec: InputSpec, example: Any) -> InputSpec:
    if spec.role != "values" or example.dtype.kind not in "iuf" or not example.size or example.min() == example.max():
        return spec
    return msgspec.structs.replace(spec, low=float(example.min()), high=float(example.max()))
