"""Export strategies of torch, newest first, and extraction of the reason when one fails."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ryzen_compile.errors import RyzenError
from ryzen_compile.exporter.dynamic_shapes import DynamicAxes, to_torch_dynamic_shapes
from ryzen_compile.torch_module import suppress_output
from ryzen_compile.utils.user_script import error_location

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

TRACER_MAX_OPSET = 20
"""The newest opset that the tracer of torch supports."""


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """The arguments of an export by torch."""

    module: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic_axes: DynamicAxes
    input_names: Sequence[str]
    output_names: Sequence[str]
    opset: int


@dataclass(frozen=True, kw_only=True)
class ExportedGraph:
    """An exported graph and the strategy that exported it."""

    model: ir.Model
    strategy: str
    notes: tuple[str, ...] = ()
    """The strategies that failed before, each with the reason, and the warnings of this strategy."""

    @property
    def opset(self) -> int:
        """The opset of the graph. It may differ from the requested one: torch keeps its opset if it cannot convert a graph."""
        return self.model.opset_imports[""]


def export_graph(request: ExportRequest) -> ExportedGraph:
    """Return the graph of the first strategy that succeeds.

    The tracer exports only one branch of an `if` on tensor values, and exports a size that the module fixes as if it were
    dynamic. It is therefore not tried if torch.export failed for one of these reasons.

    Raises:
        RyzenError: All strategies fail, or the module is not exportable; the message has the reason of each strategy.
    """
    try:
        with suppress_output():
            return _export_with_dynamo(request)
    except Exception as error:
        dynamo_reason = f"torch.export: {torch_reason(error)}"
        if (unsupported := _unsupported_error(error, dynamo_reason, request)) is not None:
            raise unsupported from error
    try:
        with suppress_output(), _redirect_stdio():
            exported = _export_with_tracer(request)
    except Exception as error:
        raise RyzenError(
            f"the module cannot be exported: {dynamo_reason}", hint=f"the fallback fails too: the tracer: {torch_reason(error)}"
        ) from error
    return dataclasses.replace(exported, notes=(dynamo_reason, *exported.notes))


def _unsupported_error(error: BaseException, reason: str, request: ExportRequest) -> RyzenError | None:
    """Return the error for a module that no strategy exports correctly, or None."""
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    causes = list(_exception_chain(error))
    if any(isinstance(cause, GuardOnDataDependentSymNode) for cause in causes):
        return RyzenError(
            f"the module branches on tensor values, which are unknown during export: {reason}",
            hint="use torch.where or torch.cond, or select the branch before the export",
        )
    match = re.search(r"static shape of (\d+) for dimension inputs\['?(.+?)'?\]\.shape\[(\d+)\]", str(causes[-1]))
    if match:
        size, name, axis = match.groups()
        dim = request.dynamic_axes.get(name, {}).get(int(axis), "NAME")
        other_axes = " ".join(
            f"--dynamic {other_name}:{other_axis}={dim}" for other_name, other_axis in _static_axes(request, int(size), name)
        )
        return RyzenError(
            f"axis {axis} of input `{name}` was requested as dynamic, but the module fixes its size at {size}",
            hint=(f"if another input shares the size, make its axis dynamic too: {other_axes}; else " if other_axes else "")
            + "omit the axis from --dynamic, or remove the fixed size from forward",
        )
    return None


def _static_axes(request: ExportRequest, size: int, exclude: str) -> Iterator[tuple[str, int]]:
    """Yield (input name, axis) of every static axis of `size`, except those of input `exclude`."""
    tensors = request.kwargs or dict(zip(request.input_names, request.args, strict=False))
    for name, tensor in tensors.items():
        for axis, length in enumerate(getattr(tensor, "shape", ())):
            if name != exclude and length == size and axis not in request.dynamic_axes.get(name, {}):
                yield name, axis


def _export_with_dynamo(request: ExportRequest) -> ExportedGraph:
    import torch

    program = torch.onnx.export(
        request.module,
        request.args,
        kwargs=request.kwargs or None,
        dynamo=True,
        opset_version=request.opset,
        dynamic_shapes=to_torch_dynamic_shapes(request.module, request.dynamic_axes, by_keyword=bool(request.kwargs)),
        input_names=list(request.input_names),
        output_names=list(request.output_names),
        verbose=False,
    )
    strict = str(program._capture_strategy).endswith("ExportStrictStrategy")
    return ExportedGraph(model=program.model, strategy="torch.export, strict" if strict else "torch.export")


def _export_with_tracer(request: ExportRequest) -> ExportedGraph:
    import onnx_ir as ir
    import torch

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught_warnings:
        warnings.simplefilter("always", torch.jit.TracerWarning)
        path = Path(folder) / "traced.onnx"
        torch.onnx.export(
            request.module,
            request.args,
            str(path),
            kwargs=request.kwargs or None,
            dynamo=False,
            opset_version=min(request.opset, TRACER_MAX_OPSET),
            dynamic_axes={name: dict(axes) for name, axes in request.dynamic_axes.items() if axes},
            input_names=list(request.input_names),
            output_names=list(request.output_names),
            verbose=False,
        )
        model = ir.load(path)
        ir.external_data.load_to_model(model)
    notes = [
        " ".join(str(warning.message).split()) for warning in caught_warnings if warning.category is torch.jit.TracerWarning
    ]
    return ExportedGraph(model=model, strategy="the tracer", notes=tuple(dict.fromkeys(notes)))


@contextlib.contextmanager
def _redirect_stdio() -> Iterator[None]:
    """Redirect the process's stdout and stderr to /dev/null: the C++ code of the tracer does not print through Python."""
    saved_descriptors = [os.dup(1), os.dup(2)]
    devnull = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(devnull, 1)
        os.dup2(devnull, 2)
        yield
    finally:
        for descriptor, saved in zip((1, 2), saved_descriptors, strict=True):
            os.dup2(saved, descriptor)
            os.close(saved)
        os.close(devnull)


def torch_reason(error: BaseException) -> str:
    """Return the reason on one line: the first line of the innermost cause, and the location in user code if known."""
    import torch

    error = list(_exception_chain(error))[-1]
    first_line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    folder = str(Path(torch.__file__).parent)
    user_locations = [
        location for location in re.findall(r'File "([^"]+)", line (\d+)', str(error)) if not location[0].startswith(folder)
    ]
    suffix = (
        f" ({Path(user_locations[-1][0]).name}, line {user_locations[-1][1]})"
        if user_locations
        else error_location(error, exclude_dir=folder)
    )
    return f"{type(error).__name__}: {first_line}{suffix}"


def _exception_chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes, outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
