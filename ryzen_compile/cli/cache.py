"""Look after what was built before: ls, stats, explain, gc, clear."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ryzen_compile.cli.build_options import Amount, builder_options, builder_wishes, data_options, named_files, shape_options
from ryzen_compile.cli.console import Talk, emit, size, talk_options

if TYPE_CHECKING:
    from ryzen_compile.artifacts.cache.store import Store


@click.group("cache")
@click.option("--folder", metavar="DIR", help="The cache folder [RYZEN_COMPILE_CACHE, else the user's cache folder].")
@click.pass_context
def command(context: click.Context, folder: str | None) -> None:
    """Look after the cache of earlier builds."""
    context.obj = folder


@command.command("ls")
@talk_options
@click.pass_obj
def ls(folder: str | None, verbosity: int, as_json: bool) -> None:
    """List the entries, the latest used first."""
    from ryzen_compile.artifacts.cache.maintenance import listing

    entries = listing(_store(folder))
    if as_json:
        emit(entries)
        return
    for one in entries:
        used = datetime.datetime.fromtimestamp(one.used_at, datetime.UTC).isoformat(timespec="minutes")
        what = ", ".join(name for name in one.parts if name.startswith(("graph", "targets"))) or "an entry"
        click.echo(f"{one.key[:12]}  {size(one.size_bytes):>9}  used {used}  {what}")
    if not entries:
        click.echo("the cache is empty")


@command.command("stats")
@talk_options
@click.pass_obj
def stats(folder: str | None, verbosity: int, as_json: bool) -> None:
    """Show where the cache is and how full."""
    from ryzen_compile.artifacts.cache.maintenance import stats as count

    found = count(_store(folder))
    if as_json:
        emit(found)
    else:
        full = f"{size(found.size_bytes)} of at most {size(found.limit_bytes)}"
        click.echo(f"{found.folder}: {found.entries} entries, {found.files} files, {full}")


@command.command("gc")
@click.option("--limit", metavar="GB", type=Amount(0, 1e9), help="Keep at most this much [the cache's own bound].")
@talk_options
@click.pass_obj
def gc(folder: str | None, limit: float | None, verbosity: int, as_json: bool) -> None:
    """Let go of what was not used for longest, and of what a killed build left."""
    from ryzen_compile.artifacts.cache.maintenance import collect

    store = _store(folder, Talk(verbosity))
    _tell(collect(store, limit_bytes=None if limit is None else round(limit * 1e9)), as_json=as_json)


@command.command("clear")
@talk_options
@click.pass_obj
def clear(folder: str | None, verbosity: int, as_json: bool) -> None:
    """Let go of everything."""
    from ryzen_compile.artifacts.cache.maintenance import clear as empty

    _tell(empty(_store(folder, Talk(verbosity))), as_json=as_json)


@command.command("explain")
@click.argument("model", nargs=-1, required=True)
@click.option("--gpu", default="auto", show_default=True)
@click.option("--backend")
@click.option("-p", "--passes")
@click.option("--compare/--no-compare", default=True)
@shape_options
@data_options
@builder_options
@talk_options
@click.pass_obj
def explain(folder: str | None, /, model: tuple[str, ...], verbosity: int, as_json: bool, **wish: Any) -> None:
    """Say whether `build` with these arguments would hit, and if not, in which part it differs from what is there."""
    talk = Talk(verbosity)
    files = named_files(model)
    options, precision = builder_wishes(wish, talk)

    from ryzen_compile.artifacts.cache.maintenance import explain as compare_keys
    from ryzen_compile.builder import sources
    from ryzen_compile.builder.config import Wishes, resolve

    store = _store(folder, talk)
    wishes = Wishes(**wish, precision=precision, options=options)  # type: ignore[arg-type]
    found = compare_keys(store, resolve(sources.named(files), wishes, store, talk).key)
    if as_json:
        emit(found)
        return
    click.echo(f"{'hit' if found.hit else 'miss'} {found.key[:12]}: {found.says}")
    for one in found.differences:
        click.echo(f"  {one}")


def _store(folder: str | None, talk: Talk | None = None) -> Store:
    from ryzen_compile.artifacts.cache.store import Store, default_folder
    from ryzen_compile.errors import RyzenError, shown

    place = Path(folder) if folder is not None else default_folder()
    if place.exists() and not place.is_dir():
        raise RyzenError(f"`{shown(place)}` is not a folder, and so no cache", hint="give --folder the folder of a cache")
    return Store(folder, progress=talk)


def _tell(collected: Any, *, as_json: bool) -> None:
    if as_json:
        emit(collected)
    elif collected.busy:
        click.echo("nothing was done: another process uses the cache")
    else:
        click.echo(f"let go of {collected.entries} entries and {collected.files} files, {size(collected.size_bytes)}")
