"""Exports of PyTorch modules by torch's exporters, as other tools make them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ryzen_compile.torch_module import suppress_output

if TYPE_CHECKING:
    import torch

TRACER, DYNAMO = "tracer", "dynamo"


def export_module(
    module: torch.nn.Module,
    samples: Mapping[str, torch.Tensor],
    path: Path,
    *,
    exporter: str,
    opset: int,
    axes: Mapping[str, Mapping[int, str]],
    outputs: Mapping[str, Mapping[int, str]],
) -> None:
    """Export `module` to `path` by `exporter`, TRACER or DYNAMO; torch's output is suppressed, its errors are propagated.

    `samples` are example inputs by name, `axes` their dynamic axes by name and index; `outputs` are the dynamic axes of the
    outputs, in order, which only the tracer reads.
    """
    import torch

    names = {"input_names": list(samples), "output_names": list(outputs)}
    with suppress_output():
        if exporter == TRACER:
            dynamic_axes = {**axes, **outputs}
            arguments = tuple(samples.values())
            torch.onnx.export(module, arguments, path, dynamo=False, opset_version=opset, dynamic_axes=dynamic_axes, **names)
        else:
            program = torch.onnx.export(
                module,
                tuple(samples.values()),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=_by_parameter(module, [axes[name] for name in samples]),
                verbose=False,
                **names,
            )
            assert program is not None
            program.save(path)


def _by_parameter(module: torch.nn.Module, axes: Sequence[Mapping[int, str]]) -> tuple[Any, ...]:
    """Return the axes of all inputs by parameter of `forward`: those of a parameter such as `*past` are one tuple."""
    parameters = inspect.signature(module.forward).parameters.values()
    single = [parameter for parameter in parameters if parameter.kind is not parameter.VAR_POSITIONAL]
    if len(single) == len(parameters):
        return tuple(axes)
    return (*axes[: len(single)], tuple(axes[len(single) :]))
