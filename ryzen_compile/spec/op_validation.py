"""What is wrong with the declaration of an op: found when it is listed, not when a build meets it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping

from ryzen_compile.errors import RyzenError
from ryzen_compile.spec import dim_expr
from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.spec.op import Attribute, Op, Port

KERNEL_ELEMENTS = ("float32", "float16", "bfloat16", "int8", "int32", "int64", "bool")
"""The element types that kernels take."""
_TRITON = ("num_warps", "num_stages")
_ANY = 16
"""A size that any expression can be worked out for."""


def problems(op: Op) -> list[str]:
    """Return what is wrong with the declaration of `op`, a sentence each; nothing where it is whole."""
    return [*_of_signature(op), *_of_expressions(op), *_of_kernel(op)]


def _of_signature(op: Op) -> Iterator[str]:
    for word in (op.domain, op.name, *(port.name for port in (*op.inputs, *op.outputs)), *(one.name for one in op.attributes)):
        if not word.isidentifier():
            yield f"`{word}` is not a name: letters, digits and `_`"
    for element in sorted(_elements(op)):
        try:
            numpy_dtype(element)
        except RyzenError as error:
            yield error.says
    for source in (op.reference, *([op.kernel.source] if op.kernel else [])):
        package = source.partition(":")[0].partition(".")[0]
        if importlib.util.find_spec(package) is None:
            yield f"`{source}` is in a package that is not installed"
    inputs = {port.name: port for port in op.inputs}
    for port in op.outputs:
        if port.over is None:
            continue
        if port.over not in inputs:
            yield f"`{port.name}` is written over `{port.over}`, which is no input"
        elif (port.element, port.dims) != (inputs[port.over].element, inputs[port.over].dims):
            yield f"`{port.name}` is written over `{port.over}`, which is of another type or shape"
    for one in op.attributes:
        if one.kind not in (int, float):
            yield f"the attribute `{one.name}` is of type {one.kind.__name__}, and must be int or float"


def _of_expressions(op: Op) -> Iterator[str]:
    known = {*_dims(op.inputs), *(one.name for one in op.attributes)}
    sizes = {f"size_{variable}" for variable in op.elements}
    for port in op.outputs:
        for token in port.dims.replace("...", "").split():
            yield from _unknown(f"the shape of `{port.name}`", token, known)
    for text in op.needs:
        yield from _unknown("`needs`", text, known)
    for name in sorted({*op.limits} - known):
        yield f"`limits` speaks of `{name}`, which no input has"
    for what, worth in (("`bytes_moved`", op.bytes_moved), ("`operations`", op.operations)):
        if worth is not None:
            yield from _unknown(what, worth, known | sizes)


def _of_kernel(op: Op) -> Iterator[str]:
    if (kernel := op.kernel) is None:
        return
    names = _dims(op.inputs)
    attributes = {one.name: one for one in op.attributes}
    known = {*names, *attributes, *(f"size_{variable}" for variable in op.elements)}
    tactics = [{*tactic} - {*_TRITON} for tactic in kernel.tactics]
    if not kernel.tactics or any(tactic != tactics[0] for tactic in tactics):
        yield "its tactics must be there, and all set the same constants"
        return
    constants = {*kernel.constants, *tactics[0]}
    parameters = [*(port.name for port in (*op.inputs, *op.outputs)), *kernel.scalars, *constants]
    for name in sorted({name for name in parameters if parameters.count(name) > 1}):
        yield f"the kernel has two parameters `{name}`"
    for name in sorted(constants & known):
        if kernel.constants.get(name) != name:
            yield f"the constant `{name}` is named like a dim or an attribute, and is not that"
    for name in sorted({*kernel.exact} - names):
        yield f"`exact` speaks of `{name}`, which is no dim"
    if not 1 <= len(kernel.grid) <= 3:
        yield f"its grid has {len(kernel.grid)} axes, and a launch has one to three"
    for name, text in kernel.scalars.items():
        yield from _unknown(f"the scalar `{name}`", text, names | {*attributes})
    for name, text in kernel.constants.items():
        yield from _unknown(f"the constant `{name}`", text, known | tactics[0])
    for text in kernel.grid:
        yield from _unknown("the grid", text, names | {*attributes} | constants)
    elements = {op.element_of(port, {}) for port in (*op.inputs, *op.outputs)} - {*op.elements} | {
        *sum(op.elements.values(), ())
    }
    for element in sorted(elements - {*KERNEL_ELEMENTS}):
        yield f"no kernel takes {element}; known are {', '.join(KERNEL_ELEMENTS)}"
    given = {element for port in op.outputs for element in op.elements.get(port.element, (port.element,))}
    for element in sorted(one for one in given - {*(op.tolerance or {})} if "float" in one):
        yield f"its tolerance says nothing of {element}"
    if op.draw is None or not op.cases:
        yield "an op with a kernel needs `draw` and `cases`, to be checked by"
    yield from _of_cases(op, names, attributes)


def _of_cases(op: Op, names: set[str], attributes: Mapping[str, Attribute]) -> Iterator[str]:
    for what, case in (("`typical`", op.typical), *((f"case {at}", case) for at, case in enumerate(op.cases))):
        if missing := sorted(({*names} | {*attributes}) - {*case}):
            yield f"{what} does not say what {', '.join(missing)} is"
        if unknown := sorted({*case} - names - {*attributes}):
            yield f"{what} speaks of {', '.join(unknown)}, which no input has"
        whole = {name for name in case if name in names or (name in attributes and attributes[name].kind is int)}
        for name, value in case.items():
            if name in whole and int(value) != value:
                yield f"{what}: `{name}` is {value}, and must be a whole number"


def _elements(op: Op) -> set[str]:
    """Return every element type that a port of `op` may have."""
    return {one for port in (*op.inputs, *op.outputs) for one in op.elements.get(port.element, (port.element,))}


def _dims(ports: Iterable[Port]) -> set[str]:
    tokens = {token for port in ports for token in port.dims.split()}
    return {token for token in tokens if token.isidentifier()} | ({"ROWS"} if "..." in tokens else set())


def _unknown(what: str, text: str, known: set[str]) -> Iterator[str]:
    try:
        names = dim_expr.names_in(text)
        dim_expr.evaluate(text, dict.fromkeys(names, _ANY))
    except (ValueError, TypeError, ArithmeticError) as error:
        yield f"{what}: {error}"
        return
    for name in sorted(names - known):
        yield f"{what} speaks of `{name}`, which is no dim"
