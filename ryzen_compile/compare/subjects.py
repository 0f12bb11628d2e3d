"""Subjects by their spelling: packages, ONNX files, PyTorch functions and recipes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ryzen_compile import registry
from ryzen_compile.compare.criteria import Precision
from ryzen_compile.compare.subject import Open, Run, Samples, Subject, as_float_type
from ryzen_compile.errors import UsageError
from ryzen_compile.interface import InputSpec, Interface, TensorSpec
from ryzen_compile.script import names_script

if TYPE_CHECKING:
    import onnx_ir as ir

    from ryzen_compile.contract import Feed
    from ryzen_compile.module import Loaded

_SPELLINGS = "give a package (model.ryzen, with #GRAPH and @VARIANT or @ENGINE), an ONNX file, FILE.py:FUNCTION or recipe:NAME"


def find(text: str) -> tuple[Subject, ...]:
    """Return what `text` spells: one subject, or all that a package holds.

    `model.ryzen` stands for every graph, variant and engine of the package, `model.ryzen#decode@fp16` for one. Raises
    UsageError for what is none of these, and whatever reading it raises.
    """
    if text.startswith("recipe:"):
        return (of_module(text.removeprefix("recipe:"), name=text),)
    if names_script(text):
        return (of_module(text, name=text),)
    path, graph, which = split(text)
    if path.is_dir() or path.suffix == ".ryzen":
        from ryzen_compile.compare.packages import of_package

        return of_package(path, graph=graph, which=which)
    if path.suffix == ".onnx" or path.is_file():
        return (of_onnx(path),)
    if text in registry.names("recipes"):
        raise UsageError(f"there is no file `{text}`", hint=f"the recipe of that name is spelt recipe:{text}")
    raise UsageError(f"there is no file `{text}`", hint=_SPELLINGS)


def find_one(text: str) -> Subject:
    """Return the one subject that `text` spells; of a package with one graph, the portable variant.

    Raises UsageError where there are several to choose from.
    """
    found = find(text)
    if len(found) > 1:
        portable = [one for one in found if one.portable]
        found = tuple(portable) if len(portable) == 1 else found
    if len(found) != 1:
        raise UsageError(
            f"`{text}` holds {len(found)} things to compare with", hint=f"name one: {', '.join(one.name for one in found)}"
        )
    return found[0]


def split(text: str) -> tuple[Path, str | None, str | None]:
    """Cut `model.ryzen#graph@variant` behind the longest path that exists, or at the first of the two signs where none does."""
    cuts = [at for at, char in enumerate(text) if char in "#@"] + [len(text)]
    cut = next((at for at in reversed(cuts) if Path(text[:at]).exists()), cuts[0])
    graph, at, which = text[cut:].partition("@")
    return Path(text[:cut]), graph[1:] or None, which if at else None


def of_onnx(path: Path) -> Subject:
    """Return an ONNX file as a subject: by ONNX Runtime, and rounded after every op where it computes in half precision."""
    from ryzen_compile.graph.interface import interface_of
    from ryzen_compile.graph.load import load

    model = load(path)
    precision = precision_of(model)
    return Subject(
        name=str(path),
        executed=spell_graph(path.name, precision),
        interface=interface_of(model),
        open=open_graph(path, precision),
        precision=precision,
        portable=precision == "fp32",
    )


def precision_of(model: ir.Model) -> Precision:
    """Return the coarsest floating-point type that `model` holds anywhere."""
    import onnx_ir as ir

    from ryzen_compile.graph.types import element_types

    held = {*element_types(model).values(), *(value.dtype for value in model.graph.initializers.values())}
    return "bf16" if ir.DataType.BFLOAT16 in held else "fp16" if ir.DataType.FLOAT16 in held else "fp32"


def spell_graph(name: str, precision: Precision) -> str:
    """Return what is really executed when a graph runs here."""
    version = registry.find_backend("onnxruntime").probe().version
    runtime = f"by ONNX Runtime {version}"
    return f"{name}, {runtime}" if precision == "fp32" else f"{name}, {precision}, rounded after every op, {runtime}"


def open_graph(path: Path, precision: Precision) -> Open:
    """Return how to run the graph at `path`.

    ONNX Runtime computes half precision in fp32 on a CPU, which hides overflow: such a graph is rewritten to round after
    every op, and that is what runs.
    """

    @contextmanager
    def opened() -> Iterator[Run]:
        backend = registry.find_backend("onnxruntime")
        if precision == "fp32":
            with backend.open(str(path)) as session:
                yield feeding(session)
            return
        from tempfile import TemporaryDirectory

        from ryzen_compile.compare.rounding import rounded
        from ryzen_compile.graph.load import load
        from ryzen_compile.graph.save import save

        with TemporaryDirectory(prefix="ryzen-compile-") as folder:
            file = Path(folder, "rounded.onnx")
            save(rounded(load(path)), file, weights="external")
            with backend.open(str(file)) as session:
                yield feeding(session)

    return opened


def feeding(session: Any) -> Run:
    """Return the session's `run`, which converts between floating-point types where the feed has others."""
    dtypes = {spec.name: spec.dtype for spec in session.inputs}

    def run(feed: Feed) -> Feed:
        outputs: Feed = session.run({name: as_float_type(array, dtypes.get(name)) for name, array in feed.items()})
        return outputs

    return run


def of_module(what: Any, *, name: str) -> Subject:
    """Return a PyTorch module as a subject: a recipe or its name, a `file.py:function`, a module, (module, inputs)."""
    import torch

    from ryzen_compile.module import load_module, silence

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
    from ryzen_compile.module import as_runner

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

    from ryzen_compile.module import arguments, leaves, to_numpy, to_torch

    if loaded.sample is None:
        return None
    args, kwargs = arguments(loaded.module, {name: to_torch(array) for name, array in loaded.sample.items()})
    with torch.inference_mode():
        outputs = {name: to_numpy(tensor) for name, tensor in leaves(loaded.module(*args, **kwargs)).items()}
    return Interface(
        inputs=tuple(InputSpec(name=name, dtype=array.dtype.name, dims=array.shape) for name, array in loaded.sample.items()),
        outputs=tuple(TensorSpec(name=name, dtype=array.dtype.name, dims=array.shape) for name, array in outputs.items()),
    )
