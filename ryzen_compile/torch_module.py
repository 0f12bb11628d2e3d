"""PyTorch modules: loading one from a recipe or a `file.py:callable`, and running it as the reference for comparisons."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ryzen_compile import registry
from ryzen_compile.errors import RyzenError, ShapeError, UsageError
from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.spec.interface import Inputs, InputSpec, Interface, RunFunction, TensorSpec
from ryzen_compile.spec.recipe import Recipe
from ryzen_compile.utils.user_script import call_user_function, describe_error, is_script_reference, load_callable

if TYPE_CHECKING:
    import numpy as np
    import torch


ModuleSource = TypeVar("ModuleSource")
"""What a module is made from; see `load_module`."""
_EXPECTED_RETURN = "return a Recipe, a torch.nn.Module, or (module, inputs) with the inputs as a tuple or a dict of tensors"


@dataclass(frozen=True, kw_only=True)
class LoadedModule:
    """A module in eval mode, with its recipe or its sample inputs."""

    name: str
    module: torch.nn.Module
    recipe: Recipe | None = None
    sample_inputs: Inputs | None = None
    """The sample inputs returned with the module, by name."""


def load_module(model: str | Recipe | tuple[Any, Any] | torch.nn.Module) -> LoadedModule:
    """Create the module that `model` specifies.

    `model` is a recipe, `NAME` or `recipe:NAME`, `hf:FOLDER`, a `file.py:callable`, a module, or a pair of a module and its
    sample inputs (a tuple in the order of `forward`, or a dict by name). Raises UsageError if it is none of these, RyzenError
    if creation fails.
    """
    try:
        import torch  # noqa: F401 - a missing PyTorch is reported here
    except ImportError as error:
        raise RyzenError(f"PyTorch cannot be imported: {error}", hint="pip install 'ryzen-compile[torch]'") from error
    source = find_source(model)
    if isinstance(source, str):
        return _wrap_module(call_user_function(source, load_callable(source)), source)
    return _wrap_module(source, "module")


def find_source(model: ModuleSource) -> ModuleSource | Recipe:
    """Return the recipe that `model` names, or `model` itself if it is a `file.py:callable` or an object.

    Raises UsageError if there is no such recipe, and the errors of the recipe source.
    """
    if not isinstance(model, str) or is_script_reference(model):
        return model
    if Path(model).suffix in (".pt", ".pth", ".bin", ".ckpt") and not registry.is_recipe_reference(model):
        raise UsageError(
            f"`{model}` is a pickle, which runs code when it is read, and is never opened",
            hint="write a file.py with a function that returns the module, and pass file.py:function",
        )
    return registry.find_recipe(model)


def content_digest(module: torch.nn.Module) -> str:
    """Return a digest of what `module` computes, in 16 hex digits: its parameters, buffers, and the files of its classes."""
    import blake3
    import torch

    digest = blake3.blake3()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    modules = {sys.modules[type(submodule).__module__] for submodule in module.modules()}
    for content in sorted(Path(file).read_bytes() for module_ in modules if (file := module_.__file__) is not None):
        digest.update(content)
    return digest.hexdigest()[:16]


def _wrap_module(model: Any, name: str) -> LoadedModule:
    import torch

    if isinstance(model, Recipe):
        return LoadedModule(
            name=model.name, module=call_user_function(f"recipe {model.name}", model.make_module).eval(), recipe=model
        )
    if isinstance(model, torch.nn.Module):
        return LoadedModule(name=name, module=model.eval())
    if not (isinstance(model, tuple) and len(model) == 2 and isinstance(model[0], torch.nn.Module)):
        raise UsageError(f"`{name}` returned a {type(model).__name__}", hint=_EXPECTED_RETURN)
    module, inputs = model
    return LoadedModule(name=name, module=module.eval(), sample_inputs=_inputs_by_name(module, inputs, name))


def _inputs_by_name(module: torch.nn.Module, inputs: Any, name: str) -> Inputs:
    """Return sample inputs keyed by the names of `forward`'s parameters."""
    import numpy as np
    import torch

    if isinstance(inputs, torch.Tensor):
        inputs = (inputs,)
    if isinstance(inputs, Mapping):
        named = dict(inputs)
    elif isinstance(inputs, Sequence):
        named = dict(zip(_positional_names(module, len(inputs)), inputs, strict=True))
    else:
        raise UsageError(f"`{name}` returned inputs of type {type(inputs).__name__}", hint=_EXPECTED_RETURN)
    for key, value in named.items():
        if not isinstance(value, (torch.Tensor, np.ndarray)):
            raise UsageError(
                f"`{name}`: the input `{key}` is a {type(value).__name__}, not a tensor",
                hint="wrap the module in one whose `forward` takes only tensors",
            )
    return {key: to_numpy(value) if isinstance(value, torch.Tensor) else value for key, value in named.items()}


def _positional_names(module: torch.nn.Module, count: int) -> list[str]:
    names: list[str] = []
    for parameter in inspect.signature(module.forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}.{index}" for index in range(count - len(names))]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    if len(names) < count:
        raise UsageError(f"{count} sample inputs were given, and forward takes {len(names)}: {', '.join(names)}")
    return names[:count]


def forward_arguments(module: torch.nn.Module, inputs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments for `forward`.

    Inputs are passed by keyword if every input name is a parameter of `forward`, otherwise by position.
    """
    parameters = inspect.signature(module.forward).parameters
    if all(name in parameters and parameters[name].kind is not inspect.Parameter.POSITIONAL_ONLY for name in inputs):
        return (), dict(inputs)
    return tuple(inputs.values()), {}


def make_run_function(module: torch.nn.Module, interface: Interface) -> RunFunction:
    """Return a function that runs `module` on inputs by name, in eval mode and without gradients.

    The function raises RyzenError with the reason and the source line if the module fails, and ShapeError if the number of
    its outputs differs from the interface.
    """
    module.eval()
    names = [spec.name for spec in interface.outputs]

    def run(inputs: Inputs) -> dict[str, Any]:
        outputs = _run(module, {spec.name: inputs[spec.name] for spec in interface.inputs})
        if len(outputs) != len(names):
            raise ShapeError(f"the module returns {len(outputs)} tensors, its interface names {len(names)}: {', '.join(names)}")
        return dict(zip(names, outputs.values(), strict=True))

    return run


def infer_interface(loaded: LoadedModule) -> Interface:
    """Return the interface of a module, inferred by running it on its sample inputs; all dims are the sizes of the samples.

    Outputs take the names under which `forward` returns them, otherwise `output`, or `output.0`, `output.1`, ... Raises
    UsageError if there are no sample inputs or no tensor outputs, RyzenError if the module fails on the samples.
    """
    if loaded.sample_inputs is None:
        raise UsageError(
            f"`{loaded.name}` makes a module without sample inputs",
            hint="return them with the module, as a tuple in the order of `forward` or as a dict by name: "
            "return module, (torch.randn(1, 3, 224, 224),)",
        )
    arrays = _run(loaded.module, loaded.sample_inputs)
    if not arrays:
        raise UsageError(f"`{loaded.name}` returns no tensor", hint="return tensors from `forward`")
    outputs = []
    for key, array in arrays.items():
        name = key if key and not key[0].isdigit() else "output" if len(arrays) == 1 else f"output.{key}"
        outputs.append(TensorSpec(name=name, dtype=array.dtype.name, dims=array.shape))
    inputs = (InputSpec(name=name, dtype=array.dtype.name, dims=array.shape) for name, array in loaded.sample_inputs.items())
    return Interface(inputs=tuple(inputs), outputs=tuple(outputs))


def _run(module: torch.nn.Module, inputs: Inputs) -> dict[str, np.ndarray[Any, Any]]:
    """Return the outputs by their path in the module's return value.

    Raises RyzenError with the reason and the source line if the module fails.
    """
    import torch

    args, kwargs = forward_arguments(module, {name: to_torch(array) for name, array in inputs.items()})
    try:
        with torch.inference_mode():
            return {path: to_numpy(tensor) for path, tensor in flatten_outputs(module(*args, **kwargs)).items()}
    except Exception as error:
        raise RyzenError(f"the module fails: {describe_error(error, exclude_dir=str(Path(torch.__file__).parent))}") from error


@contextlib.contextmanager
def suppress_output() -> Iterator[None]:
    """Suppress the warnings, log messages and prints of PyTorch and the libraries built on it."""
    previous_level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous_level)


def flatten_outputs(outputs: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a module's return value in the exporter's order, by their path: `logits`, `1`, `0.key`."""
    import torch
    from torch.utils import _pytree as pytree

    tensors: dict[str, torch.Tensor] = {}
    for path, value in pytree.tree_flatten_with_path(outputs)[0]:
        if isinstance(value, torch.Tensor):
            tensors[".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)] = value
    return tensors


def to_torch(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """Return a tensor of the same element type and bytes; types that numpy lacks are converted through integer views.

    Raises ShapeError for strings.
    """
    import numpy as np
    import torch

    array = np.ascontiguousarray(array)
    if array.dtype.kind in "USTO":
        raise ShapeError("PyTorch has no strings", hint="use numeric inputs")
    if array.dtype.name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"):
        bits = array.view(np.dtype(f"i{array.dtype.itemsize}"))
        return torch.from_numpy(bits.copy()).view(getattr(torch, array.dtype.name))
    return torch.from_numpy(array.copy())


def to_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return an array of the same element type and bytes, in host memory."""
    import torch

    tensor = tensor.detach().cpu().contiguous()
    name = str(tensor.dtype).removeprefix("torch.")
    if name == "bfloat16" or name.startswith("float8"):
        bits = tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int8)
        viewed: np.ndarray[Any, Any] = bits.numpy().view(numpy_dtype(name))
        return viewed
    array: np.ndarray[Any, Any] = tensor.numpy()
    return array
