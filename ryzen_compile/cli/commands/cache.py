"""Manage the cache of job results: ls, stats, explain, gc, clear."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ryzen_compile.cli.build_options import (
    FiniteFloat,
    builder_options,
    config_options,
    parse_model_arguments,
    pop_builder_options,
)
from ryzen_compile.cli.console import ConsoleProgress, console_options, emit
from ryzen_compile.report.formatting import format_size

if TYPE_CHECKING:
    from ryzen_compile.artifacts.cache.store import Store

SECTION = "Manage files"


@click.group("cache")
@click.option("--folder", metavar="DIR", help="The cache folder [RYZEN_COMPILE_CACHE, or the user's cache folder].")
@click.pass_context
def command(context: click.Context, folder: str | None) -> None:
    """Manage the cache of job results."""
    context.obj = folder


def _subcommand(name: str) -> Callable[[Any], click.Command]:
    """Return a decorator for a subcommand, which receives the cache folder and the console options."""
    return lambda function: command.command(name)(console_options(click.pass_obj(function)))


@_subcommand("ls")
def ls(folder: str | None, verbosity: int, as_json: bool) -> None:
    """List the entries, the most recently used first."""
    from ryzen_compile.artifacts.cache.maintenance import list_entries

    entries = list_entries(_open_store(folder))
    if as_json:
        emit({"entries": entries})
        return
    for entry in entries:
        used = datetime.datetime.fromtimestamp(entry.last_used_at, datetime.UTC).isoformat(timespec="minutes")
        contents = f"{entry.kind} {_describe(entry.parts)}".rstrip()
        click.echo(f"{entry.key[:12]}  {format_size(entry.size_bytes):>9}  used {used}  {contents}")
    if not entries:
        click.echo("the cache is empty")


@_subcommand("stats")
def stats(folder: str | None, verbosity: int, as_json: bool) -> None:
    """Show the location and the size of the cache."""
    from ryzen_compile.artifacts.cache.maintenance import stats as cache_stats

    result = cache_stats(_open_store(folder))
    if as_json:
        emit(result)
    else:
        size = f"{format_size(result.size_bytes)} of at most {format_size(result.limit_bytes)}"
        click.echo(f"{result.folder}: {result.entries} entries, {result.files} files, {size}")


@_subcommand("gc")
@click.option("--limit", metavar="GB", type=FiniteFloat(0, 1e9), help="The size to keep at most [the cache's own limit].")
def gc(folder: str | None, limit: float | None, verbosity: int, as_json: bool) -> None:
    """Remove the least recently used entries beyond the limit, and leftovers of killed builds."""
    from ryzen_compile.artifacts.cache.maintenance import collect_garbage

    store = _open_store(folder, ConsoleProgress(verbosity))
    _print_collected(collect_garbage(store, limit_bytes=None if limit is None else round(limit * 1e9)), as_json=as_json)


@_subcommand("clear")
def clear(folder: str | None, verbosity: int, as_json: bool) -> None:
    """Remove all entries."""
    from ryzen_compile.artifacts.cache.maintenance import clear as clear_cache

    _print_collected(clear_cache(_open_store(folder, ConsoleProgress(verbosity))), as_json=as_json)


@_subcommand("explain")
@click.argument("model", nargs=-1, required=True)
@config_options
@builder_options
def explain(folder: str | None, /, model: tuple[str, ...], verbosity: int, as_json: bool, **config_fields: Any) -> None:
    """Show whether `build` with these arguments would hit the cache and, if not, which part of the key differs."""
    progress = ConsoleProgress(verbosity)
    files = parse_model_arguments(model)
    options, precision = pop_builder_options(config_fields, progress)

    from ryzen_compile.artifacts.cache.maintenance import explain_lookup
    from ryzen_compile.builder import sources
    from ryzen_compile.builder.config import BuildConfig
    from ryzen_compile.builder.resolve import resolve

    store = _open_store(folder, progress)
    config = BuildConfig(**config_fields, precision=precision, options=options)
    lookup = explain_lookup(store, resolve(sources.graph_files(files), config, store, progress).package_key.cache_key)
    if as_json:
        emit(lookup)
        return
    click.echo(f"{'hit' if lookup.hit else 'miss'} {lookup.key[:12]}: {lookup.message}")
    for difference in lookup.differences:
        click.echo(f"  {difference}")


def _describe(parts: Mapping[str, str]) -> str:
    """Return the parts of a key by which a reader recognizes the result."""
    graphs = [name.split(".")[1] for name in parts if name.startswith("graphs.") and name.endswith(".fingerprint")]
    shown = ("passes", "backend", "builder.targets", "candidate_name", "baseline_name")
    return "; ".join([*graphs, *(f"{name} {parts[name]}" for name in shown if name in parts)])


def _open_store(folder: str | None, progress: ConsoleProgress | None = None) -> Store:
    from ryzen_compile.artifacts.cache.store import Store, default_folder
    from ryzen_compile.errors import RyzenError, printable

    path = Path(folder) if folder is not None else default_folder()
    if path.exists() and not path.is_dir():
        raise RyzenError(f"`{printable(path)}` is not a folder, so it is not a cache", hint="give --folder a cache folder")
    return Store(folder, progress=progress)


def _print_collected(collected: Any, *, as_json: bool) -> None:
    if as_json:
        emit(collected)
    elif collected.busy:
        click.echo("nothing was removed: another process uses the cache")
    else:
        size = format_size(collected.size_bytes)
        click.echo(f"removed {collected.entries} entries and {collected.files} files, {size}")
