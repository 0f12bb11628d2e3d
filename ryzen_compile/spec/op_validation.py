"""Validation of op declarations, so that errors are reported when ops are listed instead of during a build."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping

from ryzen_compile.errors import RyzenError
from ryzen_compile.spec import dim_expr
from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.spec.op import AttributeParam, Op, TensorParam

KERNEL_DTYPES = ("float32", "float16", "bfloat16", "int8", "int32", "int64", "bool")
"""The element types that kernels support."""
_TRITON_OPTIONS = ("num_warps", "num_stages")
_SAMPLE_SIZE = 16
"""Sample size for which every valid expression can be evaluated."""


def problems(op: Op) -> list[str]:
    """Return the errors in the declaration of `op`, one sentence each; an empty list if it is valid."""
    return [*_signature_problems(op), *_dim_expression_problems(op), *_kernel_problems(op)]


def _signature_problems(op: Op) -> Iterator[str]:
    for name in (
        op.domain,
        op.name,
        *(param.name for param in (*op.inputs, *op.outputs)),
        *(attribute.name for attribute in op.attributes),
    ):
        if not name.isidentifier():
            yield f"`{name}` is not a valid name: use letters, digits and `_`"
    for dtype in sorted(_dtypes(op)):
        try:
            numpy_dtype(dtype)
        except RyzenError as error:
            yield error.message
    for source in (op.reference, *([op.kernel.source] if op.kernel else [])):
        package = source.partition(":")[0].partition(".")[0]
        if importlib.util.find_spec(package) is None:
            yield f"`{source}` belongs to a package that is not installed"
    inputs = {param.name: param for param in op.inputs}
    for param in op.outputs:
        if param.aliases_input is None:
            continue
        if param.aliases_input not in inputs:
            yield f"the output `{param.name}` aliases `{param.aliases_input}`, which is not an input"
        elif (param.type_str, param.dims) != (inputs[param.aliases_input].type_str, inputs[param.aliases_input].dims):
            yield f"the output `{param.name}` aliases `{param.aliases_input}`, which has another type or shape"
    for attribute in op.attributes:
        if attribute.type_ not in (int, float):
            yield f"the attribute `{attribute.name}` has type {attribute.type_.__name__}, but must be int or float"


def _dim_expression_problems(op: Op) -> Iterator[str]:
    defined = {*_dim_names(op.inputs), *(attribute.name for attribute in op.attributes)}
    element_sizes = {f"size_{variable}" for variable in op.type_constraints}
    for param in op.outputs:
        for token in param.dims.replace("...", "").split():
            yield from _expression_problems(f"the shape of `{param.name}`", token, defined)
    for text in op.constraints:
        yield from _expression_problems("`constraints`", text, defined)
    for name in sorted({*op.dim_limits} - defined):
        yield f"`dim_limits` refers to `{name}`, which is not a dim of an input or an attribute"
    for label, expression in (("`bytes_moved`", op.bytes_moved), ("`flops`", op.flops)):
        if expression is not None:
            yield from _expression_problems(label, expression, defined | element_sizes)


def _kernel_problems(op: Op) -> Iterator[str]:
    if (kernel := op.kernel) is None:
        return
    names = _dim_names(op.inputs)
    attributes = {attribute.name: attribute for attribute in op.attributes}
    defined = {*names, *attributes, *(f"size_{variable}" for variable in op.type_constraints)}
    tactics = [{*tactic} - {*_TRITON_OPTIONS} for tactic in kernel.tactics]
    if not kernel.tactics or any(tactic != tactics[0] for tactic in tactics):
        yield "`tactics` must not be empty, and all tactics must set the same constants"
        return
    constants = {*kernel.constants, *tactics[0]}
    parameters = [*(param.name for param in (*op.inputs, *op.outputs)), *kernel.scalars, *constants]
    for name in sorted({name for name in parameters if parameters.count(name) > 1}):
        yield f"the kernel has several parameters called `{name}`"
    for name in sorted(constants & defined):
        if kernel.constants.get(name) != name:
            yield f"the constant `{name}` has the name of a dim or an attribute, but another value"
    for name in sorted({*kernel.static_dims} - names):
        yield f"`static_dims` refers to `{name}`, which is not a dim"
    if not 1 <= len(kernel.grid) <= 3:
        yield f"the grid must have one to three axes (got {len(kernel.grid)})"
    for name, text in kernel.scalars.items():
        yield from _expression_problems(f"the scalar `{name}`", text, names | {*attributes})
    for name, text in kernel.constants.items():
        yield from _expression_problems(f"the constant `{name}`", text, defined | tactics[0])
    for text in kernel.grid:
        yield from _expression_problems("the grid", text, names | {*attributes} | constants)
    dtypes = {op.dtype_of(param, {}) for param in (*op.inputs, *op.outputs)} - {*op.type_constraints} | {
        *sum(op.type_constraints.values(), ())
    }
    for dtype in sorted(dtypes - {*KERNEL_DTYPES}):
        yield f"kernels do not support {dtype}; supported are {', '.join(KERNEL_DTYPES)}"
    output_dtypes = {dtype for param in op.outputs for dtype in op.type_constraints.get(param.type_str, (param.type_str,))}
    for dtype in sorted(dtype for dtype in output_dtypes - {*(op.tolerance or {})} if "float" in dtype):
        yield f"`tolerance` has no entry for {dtype}"
    if op.make_inputs is None or not op.test_cases:
        yield "an op with a kernel must declare `make_inputs` and `test_cases`"
    yield from _test_case_problems(op, names, attributes)


def _test_case_problems(op: Op, dims: set[str], attributes: Mapping[str, AttributeParam]) -> Iterator[str]:
    cases = [("`typical_dims`", op.typical_dims), *((f"test case {index}", case) for index, case in enumerate(op.test_cases))]
    for label, case in cases:
        if missing := sorted(({*dims} | {*attributes}) - {*case}):
            yield f"{label} must set {', '.join(missing)}"
        if undefined := sorted({*case} - dims - {*attributes}):
            yield f"{label} sets {', '.join(undefined)}, which is not a dim of an input or an attribute"
        integers = {name for name in case if name in dims or (name in attributes and attributes[name].type_ is int)}
        for name, value in case.items():
            if name in integers and int(value) != value:
                yield f"{label}: `{name}` must be an integer (got {value})"


def _dtypes(op: Op) -> set[str]:
    """Return every element type that an input or output of `op` may have."""
    return {
        dtype for param in (*op.inputs, *op.outputs) for dtype in op.type_constraints.get(param.type_str, (param.type_str,))
    }


def _dim_names(params: Iterable[TensorParam]) -> set[str]:
    tokens = {token for param in params for token in param.dims.split()}
    return {token for token in tokens if token.isidentifier()} | ({"ROWS"} if "..." in tokens else set())


def _expression_problems(label: str, text: str, defined_names: set[str]) -> Iterator[str]:
    try:
        names = dim_expr.names_in(text)
        dim_expr.evaluate(text, dict.fromkeys(names, _SAMPLE_SIZE))
    except (ValueError, TypeError, ArithmeticError) as error:
        yield f"{label}: {error}"
        return
    for name in sorted(names - defined_names):
        yield f"{label} refers to `{name}`, which is not defined"
