"""List the custom ops, show one, compile their kernels for any GPU, check them against their references."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import click

from ryzen_compile.cli.console import Talk, emit, size, table, talk_options

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ryzen_compile.artifacts.cache.store import Store
    from ryzen_compile.ops.verification import Evidence
    from ryzen_compile.spec.op import Attribute, Op, Port


@click.group("ops", invoke_without_command=True)
@talk_options
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
        Talk(verbosity).say(f"left out: {says}")
    known = {op.name: verification.of(op, store) for op in registry.ops().values()}
    if as_json:
        emit([_data(op, known[op.name]) for op in registry.ops().values()])
        return
    rows = [(op.name, _types(op), known[op.name].says()) for op in registry.ops().values()]
    click.echo(table(rows, header=("op", "types", "evidence on this machine")))
    click.echo("\n`ryzen-compile ops show NAME` shows one; no kernel has been timed on a GPU unless a GPU is named here")


@command.command("show")
@click.argument("name")
@talk_options
def show(name: str, verbosity: int, as_json: bool) -> None:
    """Show the op that ONNX knows as NAME: signature, formula, limits, tolerance, kernels."""
    from ryzen_compile import registry
    from ryzen_compile.artifacts.cache.store import Store
    from ryzen_compile.ops import verification

    op = registry.find_op(name)
    known = verification.of(op, Store())
    if as_json:
        emit(_data(op, known))
    else:
        click.echo(_page(op, known))


@command.command("compile")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--gpu", metavar="LIST", default=None, help="GPUs to compile for, such as sm86,h200 [all that are known].")
@talk_options
def compile_(names: tuple[str, ...], gpu: str | None, verbosity: int, as_json: bool) -> None:
    """Compile the kernels of ops to PTX and cubin, at their typical dims. Needs no GPU; what is done is kept in the cache."""
    from ryzen_compile.ops import verification

    talk, sms = Talk(verbosity), _sms(gpu)
    done = {}
    for op in _chosen(names):
        with talk.stage(f"compiling {op.name}"):
            done[op.name] = verification.compile_op(op, sms, _kept(talk), talk if verbosity > 0 else None)
    if as_json:
        emit(done)
    else:
        targets = ",".join(f"sm{sm}" for sm in sms)
        click.echo(table([(name, f"{count} kernels for {targets}") for name, count in done.items()]))


@command.command("check")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@talk_options
def check(names: tuple[str, ...], verbosity: int, as_json: bool) -> None:
    """Run the kernels of ops under Triton's interpreter, and their references on ONNX Runtime, and compare the two."""
    import msgspec

    from ryzen_compile.ops import verification

    talk = Talk(verbosity)
    done = {}
    for op in _chosen(names):
        with talk.stage(f"checking {op.name}"):
            done[op.name] = verification.check(op, _kept(talk))
    if as_json:
        emit({name: msgspec.to_builtins(one) for name, one in done.items()})
    else:
        told = [(name, f"{one.cases} cases agree" if one else "has no kernel") for name, one in done.items()]
        click.echo(table(told))


def _kept(talk: Talk) -> Store:
    """Return the cache, which is where the results of a verb go; raises RyzenError where it cannot be written."""
    from ryzen_compile.artifacts.cache.store import Store
    from ryzen_compile.errors import RyzenError

    store = Store(progress=talk)
    if not store.writable:
        raise RyzenError(f"what this makes is kept in the cache, and `{store.folder}` cannot be written")
    return store


def _chosen(names: Iterable[str]) -> list[Op]:
    from ryzen_compile import registry

    found = [registry.find_op(name) for name in names]
    return found or [op for op in registry.ops().values() if op.kernel is not None]


def _sms(gpu: str | None) -> tuple[int, ...]:
    from ryzen_compile.errors import UsageError
    from ryzen_compile.kernels import SMS
    from ryzen_compile.spec.target import parse_all

    if gpu is None:
        return SMS
    targets = parse_all(gpu)
    for target in targets:
        if target.sm is None:
            raise UsageError(f"`{target}` has no kernels: it runs the references", hint="name GPUs: --gpu sm86,sm120")
    return tuple(dict.fromkeys(target.sm for target in targets if target.sm is not None))


def _types(op: Op) -> str:
    short = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
    if not op.elements:
        return " ".join(dict.fromkeys(short.get(port.element, port.element) for port in op.inputs))
    return "; ".join(
        f"{variable}: {' '.join(short.get(one, one) for one in elements)}" for variable, elements in op.elements.items()
    )


def _data(op: Op, known: Evidence) -> dict[str, Any]:
    import msgspec

    def port(one: Port) -> dict[str, Any]:
        return {"name": one.name, "type": one.element, "dims": one.dims, "says": one.says, "over": one.over}

    def attribute(one: Attribute) -> dict[str, Any]:
        return {
            "name": one.name, "type": one.kind.__name__, "lowest": one.lowest, "highest": one.highest, "says": one.says,
        }  # fmt: skip

    return {
        "name": op.name,
        "domain": op.domain,
        "version": op.version,
        "says": op.says,
        "inputs": [port(one) for one in op.inputs],
        "outputs": [port(one) for one in op.outputs],
        "attributes": [attribute(one) for one in op.attributes],
        "types": {variable: list(elements) for variable, elements in op.elements.items()},
        "formula": textwrap.dedent(op.formula).strip(),
        "limits": {name: list(bounds) for name, bounds in op.limits.items()},
        "needs": list(op.needs),
        "tolerance": dict(op.tolerance or {}),
        "tactics": [dict(tactic) for tactic in op.kernel.tactics] if op.kernel else [],
        "typical": dict(op.typical),
        "bytes_moved": _worth(op, op.bytes_moved),
        "operations": _worth(op, op.operations),
        "evidence": msgspec.to_builtins(known),
    }


def _worth(op: Op, text: str | None) -> int | None:
    """Return what an expression comes to at the op's typical dims, in half precision where the op has it."""
    from ryzen_compile.spec import dim_expr
    from ryzen_compile.spec.dtypes import numpy_dtype

    if text is None:
        return None
    halves = {variable: "float16" if "float16" in elements else elements[0] for variable, elements in op.elements.items()}
    sizes = {f"size_{variable}": numpy_dtype(element).itemsize for variable, element in halves.items()}
    return int(dim_expr.evaluate(text, {**op.typical, **sizes}))


def _page(op: Op, known: Evidence) -> str:
    data = _data(op, known)

    def ports(ports: tuple[Port, ...]) -> str:
        rows = []
        for port in ports:
            says = port.says + (f"{'; ' if port.says else ''}written over `{port.over}`" if port.over else "")
            rows.append((port.name, port.element, f"({', '.join(port.dims.split())})", says))
        return table(rows, indent="    ")

    lines = [f"{op} (version {op.version})", op.says, "", "inputs", ports(op.inputs), "outputs", ports(op.outputs)]
    if op.attributes:
        rows = [(one.name, one.kind.__name__, f"{one.lowest:g}..{one.highest:g}", one.says) for one in op.attributes]
        lines += ["attributes", table(rows, indent="    ")]
    lines += ["types", f"    {_types(op)}"]
    if data["formula"]:
        lines += ["formula", textwrap.indent(data["formula"], "    ")]
    limits = [f"{low} <= {name} <= {high}" for name, (low, high) in op.limits.items()]
    if limits or op.needs:
        lines += ["limits", f"    {', '.join([*limits, *op.needs])}"]
    if op.kernel is None:
        return "\n".join([*lines, "kernel", "    none: every runtime runs the reference, or knows the op itself"])
    lines += ["tolerance", "    " + ", ".join(f"{name} {value:g}" for name, value in (op.tolerance or {}).items())]
    lines += ["    an output x may be off by tolerance * (1 + |x|); integers are exact"]
    moved, work = data["bytes_moved"], data["operations"]
    typical = " ".join(f"{name}={value:g}" for name, value in op.typical.items())
    lines += [
        "kernel",
        f"    typical   {typical}",
        f"    tactics   {', '.join('{' + ', '.join(f'{k}={v}' for k, v in one.items()) + '}' for one in op.kernel.tactics)}",
        *([f"    moves     {size(moved)} at the typical dims, in half precision"] if moved is not None else []),
        *([f"    computes  {work:.3g} operations there"] if work is not None else []),
        *(f"    {sm:<8}  {count} of {known.kernels} compiled" for sm, count in known.compiled.items()),
        "evidence",
        f"    {known.says()}",
    ]
    return "\n".join(lines)
