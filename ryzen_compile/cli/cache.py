"""Look after what was built before: ls, stats, explain, gc, clear."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ryzen_compile.cli.build_options import (
    FiniteFloat,
    builder_options,
    data_options,
    parse_model_arguments,
    pop_builder_options,
    shape_options,
)
from ryzen_compile.cli.console import ConsoleProgress, console_options, emit, format_size

if TYPE_CHECKING:
    from ryzen_compile.artifacts.cache.store import Store


@click.group("cache")
@click.option("--folder", metavar="DIR", help="The cache folder [RYZEN_COMPILE_CACHE, else the user's cache folder].")
@click.pass_context
def command(context: click.Context, folder: str | None) -> None:
    """Look after the cache of earlier builds."""
    context.obj = folder


@command.command("ls")
@console_options
@click.pass_obj
def ls(folder: str | None, verbosity: int, as_json: bool) -> None:
    """List the entries, the latest used first."""
    from ryzen_compile.artifacts.cache.maintenance import list_entries

    entries = list_entries(_open_store(folder))
    if as_json:
        emit(entries)
        return
    for one in entries:
        used = datetime.datetime.fromtimestamp(one.last_used_at, datetime.UTC).isoformat(timespec="minutes")
        what = ", ".join(name for name in one.parts if name.startswith(("graph", "targets"))) or "an entry"
        click.echo(f"{one.key[:12]}  {format_size(one.size_bytes):>9}  used {used}  {what}")
    if not entries:
        click.echo("the cache is empty")


@command.command("stats")
@console_options
@click.pass_obj
def stats(folder: str | None, verbosity: int, as_json: bool) -> None:
    """Show where the cache is and how full."""
    from ryzen_compile.artifacts.cache.maintenance import stats as count

    found = count(_open_store(folder))
    if as_json:
        emit(found)
    else:
        full = f"{format_size(found.size_bytes)} of at most {format_size(found.limit_bytes)}"
        click.echo(f"{found.folder}: {found.entries} entries, {found.files} files, {full}")


@command.command("gc")
@click.option("--limit", metavar="GB", type=FiniteFloat(0, 1e9), help="Keep at most this much [the cache's own bound].")
@console_options
@click.pass_obj
def gc(folder: str | None, limit: float | None, verbosity: int, as_json: bool) -> None:
    """Let go of what was not used for longest, and of what a killed build left."""
    from ryzen_compile.artifacts.cache.maintenance import collect_garbage

    store = _open_store(folder, ConsoleProgress(verbosity))
    _print_collected(collect_garbage(store, limit_bytes=None if limit is None else round(limit * 1e9)), as_json=as_json)


@command.command("clear")
@console_options
@click.pass_obj
def clear(folder: str | None, verbosity: int, as_json: bool) -> None:
    """Let go of everything."""
    from ryzen_compile.artifacts.cache.maintenance import clear as empty

    _print_collected(empty(_open_store(folder, ConsoleProgress(verbosity))), as_json=as_json)


@command.command("explain")
@click.argument("model", nargs=-1, required=True)
@click.option("--gpu", default="auto", show_default=True)
@click.option("--backend")
@click.option("-p", "--passes")
@click.option("--compare/--no-compare", default=True)
@shape_options
@data_options
@builder_options
@console_options
@click.pass_obj
def explain(folder: str | None, /, model: tuple[str, ...], verbosity: int, as_json: bool, **config_fields: Any) -> None:
    """Say whether `build` with these arguments would hit, and if not, in which part it differs from what is there."""
    talk = ConsoleProgress(verbosity)
    files = parse_model_arguments(model)
    options, precision = pop_builder_options(config_fields, talk)

    from ryzen_compile.artifacts.cache.maintenance import explain_lookup as compare_keys
    from ryzen_compile.builder import sources
    from ryzen_compile.builder.config import BuildConfig, resolve

    store = _open_store(folder, talk)
    wishes = BuildConfig(**config_fields, precision=precision, options=options)  # type: ignore[arg-type]
    found = compare_keys(store, resolve(sources.graph_files(files), wishes, store, talk).cache_key)
    if as_json:
        emit(found)
        return
    click.echo(f"{'hit' if found.hit else 'miss'} {found.key[:12]}: {found.message}")
    for one in found.differences:
        click.echo(f"  {one}")


def _open_store(folder: str | None, progress: ConsoleProgress | None = None) -> Store:
    from ryzen_compile.artifacts.cache.store import Store, default_folder
    from ryzen_compile.errors import RyzenError, printable

    place = Path(folder) if folder is not None else default_folder()
    if place.exists() and not place.is_dir():
        raise RyzenError(f"`{printable(place)}` is not a folder, and so no cache", hint="give --folder the folder of a cache")
    return Store(folder, progress=progress)


def _print_collected(collected: Any, *, as_json: bool) -> None:
    if as_json:
        emit(collected)
    elif collected.busy:
        click.echo("nothing was done: another process uses the cache")
    else:
        click.echo(f"let go of {collected.entries} entries and {collected.files} files, {format_size(collected.size_bytes)}")
