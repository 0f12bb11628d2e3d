"""Modules: what a recipe or a `file.py:callable` makes, and how to run it as the baseline that all else is held to."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ryzen_compile.errors import RyzenError, ShapeError, UsageError
from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.spec.interface import InputSpec, Interface, TensorSpec
from ryzen_compile.spec.recipe import Recipe
from ryzen_compile.utils.user_script import call_user_function, describe_error, is_script_reference, load_callable

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ryzen_compile.spec.passes import Inputs

Runner = Callable[["Inputs"], "dict[str, np.ndarray[Any, Any]]"]
"""Feed in, outputs by name out; arrays on the host both."""

_EXPECTED_RETURN = "return a Recipe, a torch.nn.Module, or (module, inputs) with the inputs as a tuple or a dict of tensors"


@dataclass(frozen=True, kw_only=True)
class LoadedModule:
    """A module in eval mode, and what its maker said about it."""

    name: str
    module: torch.nn.Module
    recipe: Recipe | None = None
    sample_inputs: Inputs | None = None
    """The inputs that came with it, by name."""


def load_module(model: str | Recipe | tuple[Any, Any] | torch.nn.Module) -> LoadedModule:
    """Make the module that `what` stands for.

    It is a recipe or the name of one, a `file.py:callable`, a module, or a module with sample inputs (a tuple in the order of
    `forward`, or a dict by name). Raises UsageError where it is none of these, RyzenError where making it fails.
    """
    try:
        import torch  # noqa: F401 - said here once, in words
    except ImportError as error:
        raise RyzenError(f"PyTorch cannot be imported: {error}", hint="pip install 'ryzen-compile[torch]'") from error
    if not isinstance(model, str):
        return _wrap_module(model, "module")
    if is_script_reference(model):
        return _wrap_module(call_user_function(model, load_callable(model)), model)
    if Path(model).suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise UsageError(
            f"`{model}` is a pickle, which runs code when it is read, and is never opened",
            hint="write a file.py with a function that makes the module, and give file.py:function",
        )
    from ryzen_compile import registry

    return _wrap_module(registry.find_recipe(model), model)


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
    """Return sample inputs by the names of `forward`'s parameters."""
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
                hint="wrap the module in one whose forward takes tensors only",
            )
    return {key: to_numpy(value) if isinstance(value, torch.Tensor) else value for key, value in named.items()}


def _positional_names(module: torch.nn.Module, count: int) -> list[str]:
    names: list[str] = []
    for parameter in inspect.signature(module.forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}.{at}" for at in range(count - len(names))]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    if len(names) < count:
        raise UsageError(f"{count} sample inputs were given, and forward takes {len(names)}: {', '.join(names)}")
    return names[:count]


def forward_arguments(module: torch.nn.Module, inputs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments: by keyword where every name is one of `forward`'s, else in order."""
    parameters = inspect.signature(module.forward).parameters
    if all(name in parameters and parameters[name].kind is not inspect.Parameter.POSITIONAL_ONLY for name in inputs):
        return (), dict(inputs)
    return tuple(inputs.values()), {}


def make_runner(module: torch.nn.Module, interface: Interface) -> Runner:
    """Return a function that runs `module` on feeds, in eval mode and without gradients.

    It raises RyzenError with the reason and the line where the module fails, ShapeError where its outputs are not as many as
    the interface names.
    """
    module.eval()
    names = [spec.name for spec in interface.outputs]

    def run(feed: Inputs) -> dict[str, Any]:
        out = _run(module, {spec.name: feed[spec.name] for spec in interface.inputs})
        if len(out) != len(names):
            raise ShapeError(f"the module returns {len(out)} tensors, its interface names {len(names)}: {', '.join(names)}")
        return dict(zip(names, out.values(), strict=True))

    return run


def infer_interface(loaded: LoadedModule) -> Interface:
    """Return the interface that a module shows on the inputs it came with, of their sizes.

    Outputs have the names that `forward` returns them by, else `output`, or `output.0`, `output.1`, ... Raises UsageError where
    there are no inputs or no outputs, RyzenError where the module fails on them.
    """
    if loaded.sample_inputs is None:
        raise UsageError(f"`{loaded.name}` makes a module without sample inputs", hint="return (module, inputs)")
    found = _run(loaded.module, loaded.sample_inputs)
    if not found:
        raise UsageError(f"`{loaded.name}` returns no tensor", hint="let forward return tensors")
    outputs = []
    for place, array in found.items():
        name = place if place and not place[0].isdigit() else "output" if len(found) == 1 else f"output.{place}"
        outputs.append(TensorSpec(name=name, dtype=array.dtype.name, dims=array.shape))
    inputs = (InputSpec(name=name, dtype=array.dtype.name, dims=array.shape) for name, array in loaded.sample_inputs.items())
    return Interface(inputs=tuple(inputs), outputs=tuple(outputs))


def _run(module: torch.nn.Module, inputs: Inputs) -> dict[str, np.ndarray[Any, Any]]:
    """Return the outputs by where they stood; raises RyzenError with the reason and the line where the module fails."""
    import torch

    args, kwargs = forward_arguments(module, {name: to_torch(array) for name, array in inputs.items()})
    try:
        with torch.inference_mode():
            return {place: to_numpy(tensor) for place, tensor in flatten_outputs(module(*args, **kwargs)).items()}
    except Exception as error:
        raise RyzenError(f"the module fails: {describe_error(error, exclude_dir=str(Path(torch.__file__).parent))}") from error


@contextlib.contextmanager
def suppress_output() -> Iterator[None]:
    """Keep the warnings, log lines and prints of torch and of what is built on it off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def flatten_outputs(outputs: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of what a module returned, in the exporter's order, by where they stood: `logits`, `1`, `0.key`."""
    import torch
    from torch.utils import _pytree as pytree

    found: dict[str, torch.Tensor] = {}
    for path, value in pytree.tree_flatten_with_path(outputs)[0]:
        if isinstance(value, torch.Tensor):
            found[".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)] = value
    return found


def to_torch(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """Return a tensor of the same type and bytes; the types that numpy lacks go by their bits."""
    import numpy as np
    import torch

    array = np.ascontiguousarray(array)
    if array.dtype.kind in "USTO":
        raise ShapeError("PyTorch has no strings", hint="feed numbers")
    if array.dtype.name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"):
        bits = array.view(np.dtype(f"i{array.dtype.itemsize}"))
        return torch.from_numpy(bits.copy()).view(getattr(torch, array.dtype.name))
    return torch.from_numpy(array.copy())


def to_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return an array of the same type and bytes, on the host."""
    import torch

    tensor = tensor.detach().cpu().contiguous()
    name = str(tensor.dtype).removeprefix("torch.")
    if name == "bfloat16" or name.startswith("float8"):
        bits = tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int8)
        found: np.ndarray[Any, Any] = bits.numpy().view(numpy_dtype(name))
        return found
    array: np.ndarray[Any, Any] = tensor.numpy()
    return array
