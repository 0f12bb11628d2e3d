"""What is wrong with the declaration of an op: found when it is listed, not when a build meets it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping

from ryzen_compile.errors import RyzenError
from ryzen_compile.spec import dim_expr
from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.spec.op import AttributeParam, Op, TensorParam

KERNEL_DTYPES = ("float32", "float16", "bfloat16", "int8", "int32", "int64", "bool")
"""The element types that kernels take."""
_TRITON_OPTIONS = ("num_warps", "num_stages")
_SAMPLE_SIZE = 16
"""A size that any expression can be worked out for."""


def problems(op: Op) -> list[str]:
    """Return what is wrong with the declaration of `op`, a sentence each; nothing where it is whole."""
    return [*_signature_problems(op), *_dim_expression_problems(op), *_kernel_problems(op)]


def _signature_problems(op: Op) -> Iterator[str]:
    for word in (op.domain, op.name, *(port.name for port in (*op.inputs, *op.outputs)), *(one.name for one in op.attributes)):
        if not word.isidentifier():
            yield f"`{word}` is not a name: letters, digits and `_`"
    for element in sorted(_dtypes(op)):
        try:
            numpy_dtype(element)
        except RyzenError as error:
            yield error.message
    for source in (op.reference, *([op.kernel.source] if op.kernel else [])):
        package = source.partition(":")[0].partition(".")[0]
        if importlib.util.find_spec(package) is None:
            yield f"`{source}` is in a package that is not installed"
    inputs = {port.name: port for port in op.inputs}
    for port in op.outputs:
        if port.aliases_input is None:
            continue
        if port.aliases_input not in inputs:
            yield f"`{port.name}` is written over `{port.aliases_input}`, which is no input"
        elif (port.type_str, port.dims) != (inputs[port.aliases_input].type_str, inputs[port.aliases_input].dims):
            yield f"`{port.name}` is written over `{port.aliases_input}`, which is of another type or shape"
    for one in op.attributes:
        if one.type_ not in (int, float):
            yield f"the attribute `{one.name}` is of type {one.type_.__name__}, and must be int or float"


def _dim_expression_problems(op: Op) -> Iterator[str]:
    known = {*_dim_names(op.inputs), *(one.name for one in op.attributes)}
    sizes = {f"size_{variable}" for variable in op.type_constraints}
    for port in op.outputs:
        for token in port.dims.replace("...", "").split():
            yield from _expression_problems(f"the shape of `{port.name}`", token, known)
    for text in op.constraints:
        yield from _expression_problems("`needs`", text, known)
    for name in sorted({*op.dim_limits} - known):
        yield f"`limits` speaks of `{name}`, which no input has"
    for what, worth in (("`bytes_moved`", op.bytes_moved), ("`operations`", op.flops)):
        if worth is not None:
            yield from _expression_problems(what, worth, known | sizes)


def _kernel_problems(op: Op) -> Iterator[str]:
    if (kernel := op.kernel) is None:
        return
    names = _dim_names(op.inputs)
    attributes = {one.name: one for one in op.attributes}
    known = {*names, *attributes, *(f"size_{variable}" for variable in op.type_constraints)}
    tactics = [{*tactic} - {*_TRITON_OPTIONS} for tactic in kernel.tactics]
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
    for name in sorted({*kernel.static_dims} - names):
        yield f"`exact` speaks of `{name}`, which is no dim"
    if not 1 <= len(kernel.grid) <= 3:
        yield f"its grid has {len(kernel.grid)} axes, and a launch has one to three"
    for name, text in kernel.scalars.items():
        yield from _expression_problems(f"the scalar `{name}`", text, names | {*attributes})
    for name, text in kernel.constants.items():
        yield from _expression_problems(f"the constant `{name}`", text, known | tactics[0])
    for text in kernel.grid:
        yield from _expression_problems("the grid", text, names | {*attributes} | constants)
    elements = {op.dtype_of(port, {}) for port in (*op.inputs, *op.outputs)} - {*op.type_constraints} | {
        *sum(op.type_constraints.values(), ())
    }
    for element in sorted(elements - {*KERNEL_DTYPES}):
        yield f"no kernel takes {element}; known are {', '.join(KERNEL_DTYPES)}"
    given = {element for port in op.outputs for element in op.type_constraints.get(port.type_str, (port.type_str,))}
    for element in sorted(one for one in given - {*(op.tolerance or {})} if "float" in one):
        yield f"its tolerance says nothing of {element}"
    if op.make_inputs is None or not op.test_cases:
        yield "an op with a kernel needs `draw` and `cases`, to be checked by"
    yield from _test_case_problems(op, names, attributes)


def _test_case_problems(op: Op, dims: set[str], attributes: Mapping[str, AttributeParam]) -> Iterator[str]:
    for what, case in (("`typical`", op.typical_dims), *((f"case {at}", case) for at, case in enumerate(op.test_cases))):
        if missing := sorted(({*dims} | {*attributes}) - {*case}):
            yield f"{what} does not say what {', '.join(missing)} is"
        if unknown := sorted({*case} - dims - {*attributes}):
            yield f"{what} speaks of {', '.join(unknown)}, which no input has"
        whole = {name for name in case if name in dims or (name in attributes and attributes[name].type_ is int)}
        for name, value in case.items():
            if name in whole and int(value) != value:
                yield f"{what}: `{name}` is {value}, and must be a whole number"


def _dtypes(op: Op) -> set[str]:
    """Return every element type that a port of `op` may have."""
    return {one for port in (*op.inputs, *op.outputs) for one in op.type_constraints.get(port.type_str, (port.type_str,))}


def _dim_names(params: Iterable[TensorParam]) -> set[str]:
    tokens = {token for port in params for token in port.dims.split()}
    return {token for token in tokens if token.isidentifier()} | ({"ROWS"} if "..." in tokens else set())


def _expression_problems(label: str, text: str, defined_names: set[str]) -> Iterator[str]:
    try:
        names = dim_expr.names_in(text)
        dim_expr.evaluate(text, dict.fromkeys(names, _SAMPLE_SIZE))
    except (ValueError, TypeError, ArithmeticError) as error:
        yield f"{label}: {error}"
        return
    for name in sorted(names - defined_names):
        yield f"{label} speaks of `{name}`, which is no dim"
