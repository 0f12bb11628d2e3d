"""PyTorch modules as candidates, run in the element types of their parameters."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ryzen_compile.errors import PipelineError, RyzenError
from ryzen_compile.numerics.candidate import Candidate, OpenFunction, SampleFactory, as_float_type
from ryzen_compile.spec.dtypes import Precision
from ryzen_compile.spec.interface import InputSpec, Interface, RunFunction, TensorSpec
from ryzen_compile.spec.pass_abilities import TorchEquivalent
from ryzen_compile.utils.files import file_label

if TYPE_CHECKING:
    import torch

    from ryzen_compile.spec.passes import Pass
    from ryzen_compile.torch_module import LoadedModule


def torch_candidate(source: Any, *, name: str, passes: Sequence[Pass] = ()) -> Candidate:
    """Return a PyTorch module as a candidate: a recipe or its name, a `file.py:function`, a module, or (module, inputs).

    The PyTorch forms of `passes` are applied to the module in their order. Raises TypeError if one of them has none.
    """
    from ryzen_compile.torch_module import load_module, suppress_output

    with suppress_output():
        loaded = load_module(source)  # reports a missing PyTorch

        import torch

        for pass_ in passes:
            loaded = replace(loaded, module=_apply_in_torch(pass_, loaded.module))
    dtypes = {tensor.dtype for tensor in (*loaded.module.parameters(), *loaded.module.buffers())}
    precision: Precision = "bf16" if torch.bfloat16 in dtypes else "fp16" if torch.float16 in dtypes else "fp32"
    interface = loaded.recipe.interface if loaded.recipe else _trace_interface(loaded)
    method = f" with {', '.join(f'`{pass_}`' for pass_ in passes)}" if passes else ""
    open_with_names = functools.partial(_open_module, loaded, precision)
    return Candidate(
        name=name,
        description=f"{file_label(name)}{method}, by PyTorch {torch.__version__}"
        + ("" if precision == "fp32" else f" in {precision}"),
        interface=interface,
        open=open_with_names(interface or Interface(inputs=(), outputs=())),
        open_positional=None if loaded.recipe else open_with_names,
        precision=precision,
        samples=_sample_factory(loaded),
        can_be_baseline=True,
    )


def _apply_in_torch(pass_: Pass, module: torch.nn.Module) -> torch.nn.Module:
    if not isinstance(pass_, TorchEquivalent):
        raise TypeError(f"`{pass_.name}` has no PyTorch form")
    try:
        return pass_.torch_equivalent(module).eval()
    except RyzenError:
        raise
    except Exception as error:
        raise PipelineError(
            f"the PyTorch form of `{pass_}` failed with {type(error).__name__}: {error}",
            hint="build without --baseline, and report the defect to the developer of the pass",
        ) from error


def _open_module(loaded: LoadedModule, precision: Precision, interface: Interface) -> OpenFunction:
    from ryzen_compile.torch_module import make_run_function

    dtypes = _input_dtypes(loaded, precision, interface)

    @contextmanager
    def open_module() -> Iterator[RunFunction]:
        runner = make_run_function(loaded.module, interface)
        yield lambda inputs: runner({name: as_float_type(array, dtypes.get(name)) for name, array in inputs.items()})

    return open_module


def _input_dtypes(loaded: LoadedModule, precision: Precision, interface: Interface) -> dict[str, str]:
    """Return the element types that a module expects, by input name: those of its sample, else its half type if it has one."""
    names = [spec.name for spec in interface.inputs]
    sample = loaded.sample_inputs
    if sample is None:
        half = {"fp16": "float16", "bf16": "bfloat16"}.get(precision)
        return dict.fromkeys(names, half) if half else {}
    if set(names) == set(sample):
        return {name: array.dtype.name for name, array in sample.items()}
    return {name: array.dtype.name for name, array in zip(names, sample.values(), strict=False)}


def _sample_factory(loaded: LoadedModule) -> SampleFactory | None:
    if loaded.recipe is not None:
        recipe = loaded.recipe
        return lambda seed: list(recipe.samples(seed))
    sample = loaded.sample_inputs
    return None if sample is None else lambda seed: [sample]


def _trace_interface(loaded: LoadedModule) -> Interface | None:
    """Return the interface observed by running a module on its sample inputs, with static sizes; None without sample inputs."""
    import torch

    from ryzen_compile.torch_module import flatten_outputs, forward_arguments, to_numpy, to_torch

    if loaded.sample_inputs is None:
        return None
    args, kwargs = forward_arguments(loaded.module, {name: to_torch(array) for name, array in loaded.sample_inputs.items()})
    with torch.inference_mode():
        outputs = {name: to_numpy(tensor) for name, tensor in flatten_outputs(loaded.module(*args, **kwargs)).items()}
    return Interface(
        inputs=tuple(
            InputSpec(name=name, dtype=array.dtype.name, dims=array.shape) for name, array in loaded.sample_inputs.items()
        ),
        outputs=tuple(TensorSpec(name=name, dtype=array.dtype.name, dims=array.shape) for name, array in outputs.items()),
    )
