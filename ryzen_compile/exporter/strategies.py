"""Strategies: the ways to get a graph out of a module, newest first, and what torch has to say where one fails."""

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
"""The newest opset that torch's tracer writes."""


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What to export."""

    module: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic_axes: DynamicAxes
    input_names: Sequence[str]
    output_names: Sequence[str]
    opset: int


@dataclass(frozen=True, kw_only=True)
class ExportedGraph:
    """A graph, and how it was won."""

    model: ir.Model
    strategy: str
    notes: tuple[str, ...] = ()
    """The strategies that failed before, each with its reason, and what this one had to say."""

    @property
    def opset(self) -> int:
        """The opset of the graph, which may be another than was asked for: torch leaves what it cannot convert."""
        return self.model.opset_imports[""]


def export_graph(request: ExportRequest) -> ExportedGraph:
    """Return the graph by the first strategy that manages; raises RyzenError with all the reasons when none does.

    The tracer writes one branch of an `if` over tensor values as if it were all, and a size that the module fixes as if it
    could vary. So where torch.export met either, nothing is traced.
    """
    try:
        with suppress_output():
            return _export_with_dynamo(request)
    except Exception as error:
        newer = f"torch.export: {torch_reason(error)}"
        if (refusal := _unsupported_error(error, newer, request)) is not None:
            raise refusal from error
    try:
        with suppress_output(), _redirect_stdio():
            done = _export_with_tracer(request)
    except Exception as error:
        raise RyzenError(
            f"the module cannot be exported: {newer}", hint=f"the older way fails too: the tracer: {torch_reason(error)}"
        ) from error
    return dataclasses.replace(done, notes=(newer, *done.notes))


def _unsupported_error(error: BaseException, reason: str, request: ExportRequest) -> RyzenError | None:
    """Return the refusal of what no strategy exports rightly, else None."""
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    causes = list(_exception_chain(error))
    if any(isinstance(cause, GuardOnDataDependentSymNode) for cause in causes):
        return RyzenError(
            f"the module branches on values that are not known before it runs: {reason}",
            hint="write it with torch.where or torch.cond, or choose before the export",
        )
    fixed = re.search(r"static shape of (\d+) for dimension inputs\['?(.+?)'?\]\.shape\[(\d+)\]", str(causes[-1]))
    if fixed:
        size, name, axis = fixed.groups()
        dim = request.dynamic_axes.get(name, {}).get(int(axis), "NAME")
        more = " ".join(f"--dynamic {other}:{at}={dim}" for other, at in _static_axes(request, int(size), name))
        return RyzenError(
            f"the module fixes axis {axis} of `{name}` at {size}, which should be dynamic",
            hint=(f"where another input shares the size, name its axis too: {more}; else " if more else "")
            + "leave it out of --dynamic, or find where forward needs the number",
        )
    return None


def _static_axes(request: ExportRequest, size: int, exclude: str) -> Iterator[tuple[str, int]]:
    """Yield the input and the index of every axis of `size` that is not dynamic."""
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

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
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
    notes = [" ".join(str(warning.message).split()) for warning in caught if warning.category is torch.jit.TracerWarning]
    return ExportedGraph(model=model, strategy="the tracer", notes=tuple(dict.fromkeys(notes)))


@contextlib.contextmanager
def _redirect_stdio() -> Iterator[None]:
    """Keep off the terminal what the tracer, which is C++, prints past Python."""
    saved = [os.dup(1), os.dup(2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        for descriptor, before in zip((1, 2), saved, strict=True):
            os.dup2(before, descriptor)
            os.close(before)
        os.close(nowhere)


def torch_reason(error: BaseException) -> str:
    """Return the real reason on one line: of the innermost cause, the first line, and the user's own line where it is."""
    import torch

    error = list(_exception_chain(error))[-1]
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    folder = str(Path(torch.__file__).parent)
    told = [at for at in re.findall(r'File "([^"]+)", line (\d+)', str(error)) if not at[0].startswith(folder)]
    where = f" ({Path(told[-1][0]).name}, line {told[-1][1]})" if told else error_location(error, exclude_dir=folder)
    return f"{type(error).__name__}: {first}{where}"


def _exception_chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it was raised from, outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
