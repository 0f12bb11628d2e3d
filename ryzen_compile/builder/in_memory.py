"""Models in memory as ONNX files: an ONNX model, a model of onnx-ir, or a PyTorch module with its inputs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

from ryzen_compile.errors import UsageError
from ryzen_compile.progress import Progress
from ryzen_compile.spec.recipe import Recipe
from ryzen_compile.utils.files import StrPath

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

    from ryzen_compile.processes.limits import ResourceLimits

InMemoryModel: TypeAlias = "onnx.ModelProto | ir.Model | Recipe | tuple[Any, Any]"
"""An ONNX model, a model of onnx-ir, a recipe, or a PyTorch module with its inputs."""

_FILE_NAME = "model.onnx"


@contextmanager
def as_model_files(
    model: StrPath | Mapping[str, StrPath] | InMemoryModel,
    *,
    limits: ResourceLimits | None = None,
    progress: Progress | None = None,
) -> Iterator[StrPath | Mapping[str, StrPath]]:
    """Yield `model` as it is if it names files, otherwise the path of an ONNX file that exists until the block ends.

    A module is exported with the sizes of its inputs, and compared with the file in a process within `limits`.

    Raises:
        UsageError: `model` is none of these.
        RyzenError: The module cannot be exported.
    """
    if names_files(model):
        yield model
        return
    with tempfile.TemporaryDirectory(prefix="ryzen-compile-") as folder:
        path = Path(folder, _FILE_NAME)
        _write(model, path, limits, progress)
        yield path


def names_files(
    model: StrPath | Mapping[str, StrPath] | InMemoryModel,
) -> TypeGuard[StrPath | Mapping[str, StrPath]]:
    """Return whether `model` is a path, or paths by graph name, and not a model in memory."""
    return isinstance(model, (str, os.PathLike, Mapping))


def check_model(model: Any) -> None:
    """Raise UsageError, with what to give, if `model` is not a model in memory."""
    if isinstance(model, (Recipe, tuple)):
        return
    if hasattr(model, "forward"):
        raise UsageError(
            f"a {type(model).__name__} without inputs cannot be exported", hint="give (module, inputs): (module, (x,))"
        )
    import onnx
    import onnx_ir as ir

    if not isinstance(model, (onnx.ModelProto, ir.Model)):
        raise UsageError(
            f"a {type(model).__name__} is not a model",
            hint="give the path of an ONNX file, an onnx.ModelProto, an onnx_ir.Model or (module, inputs)",
        )


def _write(model: Any, path: Path, limits: ResourceLimits | None, progress: Progress | None) -> None:
    check_model(model)
    if isinstance(model, (Recipe, tuple)):
        from ryzen_compile.exporter import export

        export(model, path, limits=limits, progress=progress)
        return
    import onnx
    import onnx_ir as ir

    from ryzen_compile.ir.save import save

    save(ir.from_proto(model) if isinstance(model, onnx.ModelProto) else model, path)
