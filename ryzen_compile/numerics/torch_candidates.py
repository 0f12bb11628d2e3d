"""PyTorch modules as subjects, in the types that they have."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ryzen_compile.numerics.candidate import Open, Run, Samples, Subject, as_float_type
from ryzen_compile.numerics.criteria import Precision
from ryzen_compile.spec.interface import InputSpec, Interface, TensorSpec

if TYPE_CHECKING:
    from ryzen_compile.torch_module import Loaded


def of_module(what: Any, *, name: str) -> Subject:
    """Return a PyTorch module as a subject: a recipe or its name, a `file.py:function`, a module, (module, inputs)."""
    import torch

    from ryzen_compile.torch_module import load_module, silence

    with silence():
        loaded = load_module(what)
    held = {tensor.dtype for tensor in (*loaded.module.parameters(), *loaded.module.buffers())}
    precision: Precision = "bf16" if torch.bfloat16 in held else "fp16" if torch.float16 in held else "fp32"
    interface = loaded.recipe.interface if loaded.recipe else _traced(loaded)
    opened = functools.partial(_open_module, loaded, precision)
    return Subject(
        name=name,
        executed=f"{name}, by PyTorch {torch.__version__}" + ("" if precision == "fp32" else f" in {precision}"),
        interface=interface,
        open=opened(interface or Interface(inputs=(), outputs=())),
        by_order=None if loaded.recipe else opened,
        precision=precision,
        samples=_samples(loaded),
        portable=True,
    )


def _open_module(loaded: Loaded, precision: Precision, interface: Interface) -> Open:
    from ryzen_compile.torch_module import as_runner

    dtypes = _input_types(loaded, precision, interface)

    @contextmanager
    def opened() -> Iterator[Run]:
        runner = as_runner(loaded.module, interface)
        yield lambda feed: runner({name: as_float_type(array, dtypes.get(name)) for name, array in feed.items()})

    return opened


def _input_types(loaded: Loaded, precision: Precision, interface: Interface) -> dict[str, str]:
    """Return which types a module wants its inputs in: those of its sample, else what it computes in, if that is a half."""
    names = [spec.name for spec in interface.inputs]
    sample = loaded.sample
    if sample is None:
        half = {"fp16": "float16", "bf16": "bfloat16"}.get(precision)
        return dict.fromkeys(names, half) if half else {}
    if set(names) == set(sample):
        return {name: array.dtype.name for name, array in sample.items()}
    return {name: array.dtype.name for name, array in zip(names, sample.values(), strict=False)}


def _samples(loaded: Loaded) -> Samples | None:
    if loaded.recipe is not None:
        recipe = loaded.recipe
        return lambda seed: list(recipe.samples(seed))
    sample = loaded.sample
    return None if sample is None else lambda seed: [sample]


def _traced(loaded: Loaded) -> Interface | None:
    """Return the interface that a module shows on its sample inputs, of their sizes; None where it came without any."""
    import torch

    from ryzen_compile.torch_module import arguments, leaves, to_numpy, to_torch

    if loaded.sample is None:
        return None
    args, kwargs = arguments(loaded.module, {name: to_torch(array) for name, array in loaded.sample.items()})
    with torch.inference_mode():
        outputs = {name: to_numpy(tensor) for name, tensor in leaves(loaded.module(*args, **kwargs)).items()}
    return Interface(
        inputs=tuple(InputSpec(name=name, dtype=array.dtype.name, dims=array.shape) for name, array in loaded.sample.items()),
        outputs=tuple(TensorSpec(name=name, dtype=array.dtype.name, dims=array.shape) for name, array in outputs.items()),
    )
