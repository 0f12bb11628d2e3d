"""List the custom ops, show one, compile kernels for any GPU, or check kernels against references."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import click

from ryzen_compile.cli.console import ConsoleProgress, console_options, emit
from ryzen_compile.report.formatting import format_size, format_table

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ryzen_compile.artifacts.cache.store import Store
    from ryzen_compile.ops.verification import OpVerification
    from ryzen_compile.spec.op import AttributeParam, Op, TensorParam

SECTION = "Inspect"


@click.group("ops", invoke_without_command=True)
@console_options
@click.pass_context
def command(context: click.Context, verbosity: int, as_json: bool) -> None:
    """List the custom ops with their types and their verification status on this machine.

    `ops show NAME` prints one op. `ops compile` compiles PTX and cubin without a GPU. `ops check` compares kernels with
    references.
    """
    if context.invoked_subcommand is not None:
        return
    from ryzen_compile import registry
    from ryzen_compile.artifacts.cache.store import Store
    from ryzen_compile.ops import verification

    store = Store()
    ConsoleProgress(verbosity).report_unavailable(registry.broken_ops().values())
    verifications = {op.name: verification.load_verification(op, store) for op in registry.ops().values()}
    if as_json:
        emit({"ops": [_op_data(op, verifications[op.name]) for op in registry.ops().values()]})
        return
    rows = [(op.name, _format_types(op), verifications[op.name].summary()) for op in registry.ops().values()]
    click.echo(format_table(rows, header=("op", "types", "verification on this machine")))
    click.echo("\n`ryzen-compile ops show NAME` shows one op; a kernel has been timed on a GPU only if the table names a GPU")


@command.command("show")
@click.argument("name")
@console_options
def show(name: str, verbosity: int, as_json: bool) -> None:
    """Show the op with the ONNX op type NAME: signature, formula, limits, tolerance, kernels."""
    from ryzen_compile import registry
    from ryzen_compile.artifacts.cache.store import Store
    from ryzen_compile.ops import verification

    op = registry.find_op(name)
    op_verification = verification.load_verification(op, Store())
    if as_json:
        emit(_op_data(op, op_verification))
    else:
        click.echo(_format_op(op, op_verification))


@command.command("compile")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--gpu", metavar="LIST", default=None, help="The GPUs to compile for, such as sm86,h200 [all supported GPUs].")
@console_options
def compile_(names: tuple[str, ...], gpu: str | None, verbosity: int, as_json: bool) -> None:
    """Compile the kernels of ops to PTX and cubin for their typical dims. Needs no GPU; the results are cached."""
    from ryzen_compile.ops import verification

    progress, sms = ConsoleProgress(verbosity), _sms(gpu)
    counts = {}
    for op in _select_ops(names):
        with progress.stage(f"compile {op.name}"):
            store = _writable_store(progress)
            counts[op.name] = verification.compile_op(op, sms, store, progress if verbosity > 0 else None)
    if as_json:
        emit({"compiled": counts})
    else:
        targets = ",".join(f"sm{sm}" for sm in sms)
        click.echo(format_table([(name, f"{count} kernels for {targets}") for name, count in counts.items()]))


@command.command("check")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@console_options
def check(names: tuple[str, ...], verbosity: int, as_json: bool) -> None:
    """Run the kernels of ops in Triton's interpreter and their references in ONNX Runtime, and compare the outputs."""
    from ryzen_compile.ops import verification

    progress = ConsoleProgress(verbosity)
    checks = {}
    for op in _select_ops(names):
        with progress.stage(f"check {op.name}"):
            checks[op.name] = verification.check_op(op, _writable_store(progress))
    if as_json:
        emit({"checks": checks})
    else:
        rows = [(name, f"{check.cases} cases agree" if check else "has no kernel") for name, check in checks.items()]
        click.echo(format_table(rows))


def _writable_store(progress: ConsoleProgress) -> Store:
    """Return the cache, which stores the results of the command; raises RyzenError if it cannot be written."""
    from ryzen_compile.artifacts.cache.store import Store
    from ryzen_compile.errors import RyzenError

    store = Store(progress=progress)
    if not store.writable:
        raise RyzenError(
            f"the results are stored in the cache, and the cache folder `{store.folder}` cannot be written",
            hint="set RYZEN_COMPILE_CACHE to a folder that can be written",
        )
    return store


def _select_ops(names: Iterable[str]) -> list[Op]:
    from ryzen_compile import registry

    selected = [registry.find_op(name) for name in names]
    return selected or [op for op in registry.ops().values() if op.kernel is not None]


def _sms(gpu: str | None) -> tuple[int, ...]:
    from ryzen_compile.errors import UsageError
    from ryzen_compile.kernels import SMS
    from ryzen_compile.spec.target import parse_targets

    if gpu is None:
        return SMS
    targets = parse_targets(gpu)
    for target in targets:
        if target.sm is None:
            raise UsageError(f"`{target}` has no kernels: it runs the reference of each op", hint="give GPUs: --gpu sm86,sm120")
    return tuple(dict.fromkeys(target.sm for target in targets if target.sm is not None))


def _format_types(op: Op) -> str:
    short_names = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
    if not op.type_constraints:
        return " ".join(dict.fromkeys(short_names.get(param.type_str, param.type_str) for param in op.inputs))
    return "; ".join(
        f"{variable}: {' '.join(short_names.get(dtype, dtype) for dtype in dtypes)}"
        for variable, dtypes in op.type_constraints.items()
    )


def _op_data(op: Op, verification: OpVerification) -> dict[str, Any]:
    import msgspec

    def tensor_data(param: TensorParam) -> dict[str, Any]:
        return {
            "name": param.name,
            "type": param.type_str,
            "dims": param.dims,
            "description": param.description,
            "aliases_input": param.aliases_input,
        }

    def attribute_data(param: AttributeParam) -> dict[str, Any]:
        return {
            "name": param.name,
            "type": param.type_.__name__,
            "minimum": param.minimum,
            "maximum": param.maximum,
            "description": param.description,
        }

    return {
        "name": op.name,
        "domain": op.domain,
        "version": op.version,
        "description": op.description,
        "inputs": [tensor_data(param) for param in op.inputs],
        "outputs": [tensor_data(param) for param in op.outputs],
        "attributes": [attribute_data(param) for param in op.attributes],
        "types": {variable: list(dtypes) for variable, dtypes in op.type_constraints.items()},
        "formula": textwrap.dedent(op.formula).strip(),
        "dim_limits": {name: list(limits) for name, limits in op.dim_limits.items()},
        "constraints": list(op.constraints),
        "tolerance": dict(op.tolerance or {}),
        "tactics": [dict(tactic) for tactic in op.kernel.tactics] if op.kernel else [],
        "typical_dims": dict(op.typical_dims),
        "bytes_moved": _evaluate_at_typical_dims(op, op.bytes_moved),
        "flops": _evaluate_at_typical_dims(op, op.flops),
        "verification": msgspec.to_builtins(verification),
    }


def _evaluate_at_typical_dims(op: Op, expression: str | None) -> int | None:
    """Return the value of an expression at the op's typical dims, with fp16 elements where the op supports them."""
    from ryzen_compile.spec import dim_expr
    from ryzen_compile.spec.dtypes import numpy_dtype

    if expression is None:
        return None
    dtypes = {variable: "float16" if "float16" in dtypes else dtypes[0] for variable, dtypes in op.type_constraints.items()}
    sizes = {f"size_{variable}": numpy_dtype(dtype).itemsize for variable, dtype in dtypes.items()}
    return int(dim_expr.evaluate(expression, {**op.typical_dims, **sizes}))


def _format_op(op: Op, verification: OpVerification) -> str:
    data = _op_data(op, verification)

    def format_tensors(params: tuple[TensorParam, ...]) -> str:
        rows = []
        for param in params:
            separator = "; " if param.description else ""
            aliasing = f"{separator}written in place of `{param.aliases_input}`" if param.aliases_input else ""
            rows.append((param.name, param.type_str, f"({', '.join(param.dims.split())})", param.description + aliasing))
        return format_table(rows, indent="    ")

    lines = [f"{op} (version {op.version})", op.description, ""]
    lines += ["inputs", format_tensors(op.inputs), "outputs", format_tensors(op.outputs)]
    if op.attributes:
        rows = [
            (param.name, param.type_.__name__, f"{param.minimum:g}..{param.maximum:g}", param.description)
            for param in op.attributes
        ]
        lines += ["attributes", format_table(rows, indent="    ")]
    lines += ["types", f"    {_format_types(op)}"]
    if data["formula"]:
        lines += ["formula", textwrap.indent(data["formula"], "    ")]
    limits = [f"{low} <= {name} <= {high}" for name, (low, high) in op.dim_limits.items()]
    if limits or op.constraints:
        lines += ["limits", f"    {', '.join([*limits, *op.constraints])}"]
    if op.kernel is None:
        return "\n".join([*lines, "kernel", "    none: every runtime runs the reference, or implements the op itself"])
    lines += ["tolerance", "    " + ", ".join(f"{name} {value:g}" for name, value in (op.tolerance or {}).items())]
    lines += ["    the absolute error of an output x is at most tolerance * (1 + |x|); integers are exact"]
    bytes_moved, flops = data["bytes_moved"], data["flops"]
    typical_dims = " ".join(f"{name}={value:g}" for name, value in op.typical_dims.items())
    tactics = ("{" + ", ".join(f"{name}={value}" for name, value in tactic.items()) + "}" for tactic in op.kernel.tactics)
    lines += [
        "kernel",
        f"    typical   {typical_dims}",
        f"    tactics   {', '.join(tactics)}",
        *([f"    memory    {format_size(bytes_moved)} moved at the typical dims in fp16"] if bytes_moved is not None else []),
        *([f"    compute   {flops:.3g} operations at the typical dims"] if flops is not None else []),
        *(
            f"    {sm:<8}  {count} of {verification.kernel_count} compiled"
            for sm, count in verification.compiled_counts.items()
        ),
        "verification",
        f"    {verification.summary()}",
    ]
    return "\n".join(lines)
