"""List the custom ops, show one, compile their kernels for any GPU, check them against their references."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import click

from ryzen_compile.cli.console import ConsoleProgress, console_options, emit, format_size, format_table

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ryzen_compile.artifacts.cache.store import Store
    from ryzen_compile.ops.verification import OpVerification
    from ryzen_compile.spec.op import AttributeParam, Op, TensorParam


@click.group("ops", invoke_without_command=True)
@console_options
@click.pass_context
def command(context: click.Context, verbosity: int, as_json: bool) -> None:
    """List the custom ops with their types, their kernels and what is known of them on this machine.

    `ops show NAME` prints one, `ops compile` makes PTX and cubin without a GPU, `ops check` runs kernels against references.
    """
    if context.invoked_subcommand is not None:
        return
    from ryzen_compile import registry
    from ryzen_compile.artifacts.cache.store import Store
    from ryzen_compile.ops import verification

    store = Store()
    for says in registry.broken_ops().values():
        ConsoleProgress(verbosity).message(f"left out: {says}")
    known = {op.name: verification.load_verification(op, store) for op in registry.ops().values()}
    if as_json:
        emit([_op_data(op, known[op.name]) for op in registry.ops().values()])
        return
    rows = [(op.name, _format_types(op), known[op.name].summary()) for op in registry.ops().values()]
    click.echo(format_table(rows, header=("op", "types", "evidence on this machine")))
    click.echo("\n`ryzen-compile ops show NAME` shows one; no kernel has been timed on a GPU unless a GPU is named here")


@command.command("show")
@click.argument("name")
@console_options
def show(name: str, verbosity: int, as_json: bool) -> None:
    """Show the op that ONNX knows as NAME: signature, formula, limits, tolerance, kernels."""
    from ryzen_compile import registry
    from ryzen_compile.artifacts.cache.store import Store
    from ryzen_compile.ops import verification

    op = registry.find_op(name)
    known = verification.load_verification(op, Store())
    if as_json:
        emit(_op_data(op, known))
    else:
        click.echo(_format_op(op, known))


@command.command("compile")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--gpu", metavar="LIST", default=None, help="GPUs to compile for, such as sm86,h200 [all that are known].")
@console_options
def compile_(names: tuple[str, ...], gpu: str | None, verbosity: int, as_json: bool) -> None:
    """Compile the kernels of ops to PTX and cubin, at their typical dims. Needs no GPU; what is done is kept in the cache."""
    from ryzen_compile.ops import verification

    talk, sms = ConsoleProgress(verbosity), _sms(gpu)
    done = {}
    for op in _select_ops(names):
        with talk.stage(f"compiling {op.name}"):
            done[op.name] = verification.compile_op(op, sms, _writable_store(talk), talk if verbosity > 0 else None)
    if as_json:
        emit(done)
    else:
        targets = ",".join(f"sm{sm}" for sm in sms)
        click.echo(format_table([(name, f"{count} kernels for {targets}") for name, count in done.items()]))


@command.command("check")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@console_options
def check(names: tuple[str, ...], verbosity: int, as_json: bool) -> None:
    """Run the kernels of ops under Triton's interpreter, and their references on ONNX Runtime, and compare the two."""
    import msgspec

    from ryzen_compile.ops import verification

    talk = ConsoleProgress(verbosity)
    done = {}
    for op in _select_ops(names):
        with talk.stage(f"checking {op.name}"):
            done[op.name] = verification.check_op(op, _writable_store(talk))
    if as_json:
        emit({name: msgspec.to_builtins(one) for name, one in done.items()})
    else:
        told = [(name, f"{one.cases} cases agree" if one else "has no kernel") for name, one in done.items()]
        click.echo(format_table(told))


def _writable_store(progress: ConsoleProgress) -> Store:
    """Return the cache, which is where the results of a verb go; raises RyzenError where it cannot be written."""
    from ryzen_compile.artifacts.cache.store import Store
    from ryzen_compile.errors import RyzenError

    store = Store(progress=progress)
    if not store.writable:
        raise RyzenError(f"what this makes is kept in the cache, and `{store.folder}` cannot be written")
    return store


def _select_ops(names: Iterable[str]) -> list[Op]:
    from ryzen_compile import registry

    found = [registry.find_op(name) for name in names]
    return found or [op for op in registry.ops().values() if op.kernel is not None]


def _sms(gpu: str | None) -> tuple[int, ...]:
    from ryzen_compile.errors import UsageError
    from ryzen_compile.kernels import SMS
    from ryzen_compile.spec.target import parse_targets

    if gpu is None:
        return SMS
    targets = parse_targets(gpu)
    for target in targets:
        if target.sm is None:
            raise UsageError(f"`{target}` has no kernels: it runs the references", hint="name GPUs: --gpu sm86,sm120")
    return tuple(dict.fromkeys(target.sm for target in targets if target.sm is not None))


def _format_types(op: Op) -> str:
    short = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
    if not op.type_constraints:
        return " ".join(dict.fromkeys(short.get(port.type_str, port.type_str) for port in op.inputs))
    return "; ".join(
        f"{variable}: {' '.join(short.get(one, one) for one in elements)}" for variable, elements in op.type_constraints.items()
    )


def _op_data(op: Op, verification: OpVerification) -> dict[str, Any]:
    import msgspec

    def port(one: TensorParam) -> dict[str, Any]:
        return {
            "name": one.name,
            "type": one.type_str,
            "dims": one.dims,
            "description": one.description,
            "aliases_input": one.aliases_input,
        }

    def attribute(one: AttributeParam) -> dict[str, Any]:
        return {
            "name": one.name, "type": one.type_.__name__, "minimum": one.minimum, "maximum": one.maximum, "description": one.description,
        }  # fmt: skip

    return {
        "name": op.name,
        "domain": op.domain,
        "version": op.version,
        "description": op.description,
        "inputs": [port(one) for one in op.inputs],
        "outputs": [port(one) for one in op.outputs],
        "attributes": [attribute(one) for one in op.attributes],
        "types": {variable: list(elements) for variable, elements in op.type_constraints.items()},
        "formula": textwrap.dedent(op.formula).strip(),
        "dim_limits": {name: list(bounds) for name, bounds in op.dim_limits.items()},
        "constraints": list(op.constraints),
        "tolerance": dict(op.tolerance or {}),
        "tactics": [dict(tactic) for tactic in op.kernel.tactics] if op.kernel else [],
        "typical_dims": dict(op.typical_dims),
        "bytes_moved": _evaluate_at_typical_dims(op, op.bytes_moved),
        "flops": _evaluate_at_typical_dims(op, op.flops),
        "evidence": msgspec.to_builtins(verification),
    }


def _evaluate_at_typical_dims(op: Op, expression: str | None) -> int | None:
    """Return what an expression comes to at the op's typical dims, in half precision where the op has it."""
    from ryzen_compile.spec import dim_expr
    from ryzen_compile.spec.dtypes import numpy_dtype

    if expression is None:
        return None
    halves = {
        variable: "float16" if "float16" in elements else elements[0] for variable, elements in op.type_constraints.items()
    }
    sizes = {f"size_{variable}": numpy_dtype(element).itemsize for variable, element in halves.items()}
    return int(dim_expr.evaluate(expression, {**op.typical_dims, **sizes}))


def _format_op(op: Op, verification: OpVerification) -> str:
    data = _op_data(op, verification)

    def ports(ports: tuple[TensorParam, ...]) -> str:
        rows = []
        for port in ports:
            says = port.description + (
                f"{'; ' if port.description else ''}written over `{port.aliases_input}`" if port.aliases_input else ""
            )
            rows.append((port.name, port.type_str, f"({', '.join(port.dims.split())})", says))
        return format_table(rows, indent="    ")

    lines = [f"{op} (version {op.version})", op.description, "", "inputs", ports(op.inputs), "outputs", ports(op.outputs)]
    if op.attributes:
        rows = [(one.name, one.type_.__name__, f"{one.minimum:g}..{one.maximum:g}", one.description) for one in op.attributes]
        lines += ["attributes", format_table(rows, indent="    ")]
    lines += ["types", f"    {_format_types(op)}"]
    if data["formula"]:
        lines += ["formula", textwrap.indent(data["formula"], "    ")]
    limits = [f"{low} <= {name} <= {high}" for name, (low, high) in op.dim_limits.items()]
    if limits or op.constraints:
        lines += ["limits", f"    {', '.join([*limits, *op.constraints])}"]
    if op.kernel is None:
        return "\n".join([*lines, "kernel", "    none: every runtime runs the reference, or knows the op itself"])
    lines += ["tolerance", "    " + ", ".join(f"{name} {value:g}" for name, value in (op.tolerance or {}).items())]
    lines += ["    an output x may be off by tolerance * (1 + |x|); integers are exact"]
    moved, work = data["bytes_moved"], data["flops"]
    typical = " ".join(f"{name}={value:g}" for name, value in op.typical_dims.items())
    lines += [
        "kernel",
        f"    typical   {typical}",
        f"    tactics   {', '.join('{' + ', '.join(f'{k}={v}' for k, v in one.items()) + '}' for one in op.kernel.tactics)}",
        *([f"    moves     {format_size(moved)} at the typical dims, in half precision"] if moved is not None else []),
        *([f"    computes  {work:.3g} operations there"] if work is not None else []),
        *(
            f"    {sm:<8}  {count} of {verification.kernel_count} compiled"
            for sm, count in verification.compiled_counts.items()
        ),
        "evidence",
        f"    {verification.summary()}",
    ]
    return "\n".join(lines)
