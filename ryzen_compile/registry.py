"""The register of what can be named: passes, ops, recipes and backends, found through entry points.

Each room offers one entry point: a function that returns its members by name, as the modules that hold them. A module is
imported when its member is asked for, so listing costs nothing, and a new file in a room is a new member.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ryzen_compile.errors import RyzenError, UsageError, did_you_mean

if TYPE_CHECKING:
    from ryzen_compile.backends.api import Backend
    from ryzen_compile.spec.op import Op
    from ryzen_compile.spec.passes import Pass
    from ryzen_compile.spec.properties import Property
    from ryzen_compile.spec.recipe import Recipe

T = TypeVar("T")
_SINGULAR = {"passes": "pass", "ops": "op", "recipes": "recipe", "backends": "backend"}


def modules_of(package: str, *, exclude: Iterable[str] = ()) -> dict[str, str]:
    """Return the public modules of `package`, as {kebab-case name: module}, without those named in `besides`."""
    path = importlib.import_module(package).__path__
    names = sorted(info.name for info in pkgutil.iter_modules(path) if not info.name.startswith("_"))
    return {name.replace("_", "-"): f"{package}.{name}" for name in names if name not in set(exclude)}


@functools.cache
def _members(group: str) -> Mapping[str, str]:
    found: dict[str, str] = {}
    owner: dict[str, str] = {}
    for entry in sorted(entry_points(group=f"ryzen_compile.{group}"), key=lambda entry: entry.value):
        for name, module in entry.load()().items():
            if owner.setdefault(name, entry.value) != entry.value:
                raise RyzenError(
                    f"`{name}` is offered as one of the {group} by `{owner[name]}` and by `{entry.value}`",
                    hint="uninstall one of the two packages",
                )
            found[name] = module
    return found


def names(group: str) -> list[str]:
    """Return the names of the members of `room` (`passes`, `ops`, `recipes` or `backends`), sorted."""
    return sorted(_members(group))


def _import_member(group: str, name: str) -> Any:
    return importlib.import_module(_module_name(group, name))


def _module_name(group: str, name: str) -> str:
    members = _members(group)
    if name not in members:
        raise UsageError(f"there is no {_SINGULAR[group]} `{name}`", hint=did_you_mean(name, list(members)))
    return members[name]


def _single_instance(kind: type[T], module: Any) -> T:
    found = [value for value in vars(module).values() if isinstance(value, kind)]
    if len(found) != 1:
        raise TypeError(f"{module.__name__} must hold one {kind.__name__}, and holds {len(found)}")
    return found[0]


def find_pass(name: str) -> type[Pass]:
    """Return the pass called `name`; its module holds one class of that name."""
    from ryzen_compile.spec.passes import Pass

    module = _import_member("passes", name)
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Pass) and getattr(value, "name", None) == name:
            return value
    raise TypeError(f"{module.__name__} must hold a Pass whose name is `{name}`")


def ops() -> Mapping[str, Op]:
    """Return every op by its ONNX name, sorted; a folder of the room holds one op, or a family of them.

    What cannot be imported, or is not declared as an op must be, is left out: see `broken_ops`.
    """
    return _ops()[0]


def broken_ops() -> Mapping[str, str]:
    """Return the folders of the room whose ops are left out, each with what is wrong with it."""
    return _ops()[1]


@functools.cache
def _ops() -> tuple[Mapping[str, Op], Mapping[str, str]]:
    from ryzen_compile.spec.op import Op
    from ryzen_compile.spec.op_validation import problems

    found: dict[str, Op] = {}
    broken: dict[str, str] = {}
    for folder in names("ops"):
        try:
            module = _import_member("ops", folder)
        except Exception as error:  # noqa: BLE001 - it is another's code, and is told to who asks for its ops
            broken[folder] = f"`{_module_name('ops', folder)}` cannot be imported: {type(error).__name__}: {error}"
            continue
        for value in vars(module).values():
            if not isinstance(value, Op):
                continue
            if wrong := problems(value):
                broken[folder] = f"`{value.name}` of `{module.__name__}` is not whole: {'; '.join(wrong)}"
            elif found.setdefault(value.name, value) is not value:
                raise RyzenError(
                    f"two packages offer an op called `{value.name}`", hint="uninstall one of them, or rename its op"
                )
    return dict(sorted(found.items())), broken


def import_members(group: str) -> Mapping[str, Any]:
    """Return the modules of the members of `room`, imported."""
    return {name: _import_member(group, name) for name in names(group)}


def find_op(name: str) -> Op:
    """Return the op that ONNX knows as `name`."""
    if name not in ops():
        left_out = [says for says in broken_ops().values() if name in says]
        raise UsageError(f"there is no op `{name}`", hint="; ".join(left_out) or did_you_mean(name, [*ops()]))
    return ops()[name]


def find_recipe(name: str) -> Recipe:
    """Return the recipe called `name`."""
    from ryzen_compile.spec.recipe import Recipe

    return _single_instance(Recipe, _import_member("recipes", name))


def find_backend(name: str) -> Backend:
    """Return the backend called `name`; its module holds it as BACKEND."""
    backend: Backend = _import_member("backends", name).BACKEND
    return backend


def source_path(group: str, name: str) -> Path:
    """Return the file of the member `name` of `room`, which is not imported for it; raises UsageError for an unknown one."""
    spec = importlib.util.find_spec(_module_name(group, name))
    if spec is None or spec.origin is None:
        raise RyzenError(f"`{name}` of the {group} has no file", hint="install the package that offers it again")
    return Path(spec.origin)


def provider_packages(group: str) -> list[str]:
    """Return the packages that offer members of `group`, sorted."""
    return sorted({entry.module for entry in entry_points(group=f"ryzen_compile.{group}")})


def properties() -> frozenset[Property]:
    """Return every fact that a known pass speaks of."""
    return properties_of(find_pass(name) for name in names("passes"))


def properties_of(passes: Iterable[Pass | type[Pass]]) -> frozenset[Property]:
    """Return every fact that one of `passes` speaks of."""
    return frozenset(fact for pass_ in passes for fact in pass_.requires | pass_.ensures | pass_.invalidates)
