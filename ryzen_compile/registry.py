"""Registry of passes, scores, ops, recipes, backends and commands, discovered through entry points.

Each providing package declares one entry point per group: a function that returns {member name: module name}. A module is
imported on the first use of its member, so listing names imports nothing, and a new module in the package is a new member.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ryzen_compile.errors import RyzenError, UsageError, did_you_mean
from ryzen_compile.utils.path_hints import is_hugging_face_folder
from ryzen_compile.utils.source_digest import module_digest
from ryzen_compile.utils.user_script import is_script_reference

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint, EntryPoints

    from click import Command

    from ryzen_compile.backends.api import Backend
    from ryzen_compile.spec.legalization_pass import LegalizationPass
    from ryzen_compile.spec.op import Op
    from ryzen_compile.spec.passes import Pass
    from ryzen_compile.spec.precision_pass import PrecisionPass
    from ryzen_compile.spec.properties import Property
    from ryzen_compile.spec.recipe import Recipe

T = TypeVar("T")
_SINGULAR = {
    "passes": "pass",
    "kv_scores": "score",
    "ops": "op",
    "recipes": "recipe",
    "recipe_sources": "recipe source",
    "backends": "backend",
    "commands": "command",
}


def modules_of(package: str, *, exclude: Iterable[str] = ()) -> dict[str, str]:
    """Return the public modules of `package` as {kebab-case name: module name}, without the module names in `exclude`."""
    path = importlib.import_module(package).__path__
    names = sorted(info.name for info in pkgutil.iter_modules(path) if not info.name.startswith("_"))
    return {name.replace("_", "-"): f"{package}.{name}" for name in names if name not in set(exclude)}


def _entry_points(group: str) -> EntryPoints:
    from importlib.metadata import entry_points  # imported here: it takes longer than the rest of this module

    return entry_points(group=f"ryzen_compile.{group}")


def has_external_members(group: str) -> bool:
    """Return whether an installed package other than this one may provide members of `group`.

    It reads the files in which installers record entry points, which takes about 1 ms; listing the members takes 20 ms.
    """
    header = f"[ryzen_compile.{group}]".encode()
    for folder in {*sys.path}:
        with contextlib.suppress(OSError), os.scandir(folder or ".") as entries:
            for entry in entries:
                if entry.name.endswith((".dist-info", ".egg-info")) and not entry.name.startswith(
                    ("ryzen_compile-", "ryzen_compile.")
                ):
                    with contextlib.suppress(OSError):
                        if header in Path(entry.path, "entry_points.txt").read_bytes():
                            return True
    return False


@functools.cache
def _members(group: str) -> Mapping[str, str]:
    members: dict[str, str] = {}
    providers: dict[str, str] = {}
    for entry in sorted(_entry_points(group), key=lambda entry: entry.value):
        for name, module in _load_members(entry).items():
            if providers.setdefault(name, entry.value) != entry.value:
                raise RyzenError(
                    f"two packages provide the {_SINGULAR[group]} `{name}`: `{providers[name]}` and `{entry.value}`",
                    hint="uninstall one of the two packages",
                )
            members[name] = module
    return members


def _load_members(entry: EntryPoint) -> Mapping[str, str]:
    """Return what the function of an entry point lists. Raises RyzenError, which names the distribution, if it cannot run."""
    try:
        members: Mapping[str, str] = entry.load()()
    except Exception as error:
        distribution = f"the package `{entry.dist.name}`" if entry.dist else "a package"
        raise RyzenError(
            f"{distribution} cannot list its members: `{entry.value}`: {type(error).__name__}: {error}",
            hint="repair or uninstall the package",
        ) from error
    return members


def names(group: str) -> list[str]:
    """Return the sorted names of the members of `group`, such as `passes` or `recipes`; _SINGULAR lists the groups."""
    return sorted(_members(group))


def _import_member(group: str, name: str) -> Any:
    """Import the module of a member. Raises UsageError if there is no such member, RyzenError if it cannot be imported."""
    module = module_name(group, name)
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise RyzenError(
            f"the {_SINGULAR[group]} `{name}` cannot be imported: `{module}`: {type(error).__name__}: {error}",
            hint="repair or uninstall the package that provides it",
        ) from error


def module_name(group: str, name: str) -> str:
    """Return the module of the member `name` of `group` without importing it. Raises UsageError if there is no such member."""
    members = _members(group)
    if name not in members:
        reinstall = f"install ryzen-compile again: no entry point of the group `ryzen_compile.{group}` is installed"
        hint = did_you_mean(name, list(members)) if members else reinstall
        raise UsageError(f"there is no {_SINGULAR[group]} `{name}`", hint=hint)
    return members[name]


def _find_object(group: str, name: str, attribute: str) -> Any:
    """Return the object that the module of a member defines as `attribute`. Raises RyzenError if it defines none."""
    module = _import_member(group, name)
    if not hasattr(module, attribute):
        raise _wrong_module(group, name, f"`{attribute}`")
    return getattr(module, attribute)


def _wrong_module(group: str, name: str, expected: str) -> RyzenError:
    return RyzenError(
        f"the {_SINGULAR[group]} `{name}` cannot be used: `{module_name(group, name)}` does not define {expected}",
        hint="repair or uninstall the package that provides it",
    )


def find_class(group: str, name: str, base: type[T]) -> type[T]:
    """Return the subclass of `base` whose attribute `name` is `name`, from the module of the member `name` of `group`.

    Raises UsageError if there is no such member, RyzenError if its module cannot be imported or defines no such class.
    """
    for value in vars(_import_member(group, name)).values():
        if isinstance(value, type) and issubclass(value, base) and getattr(value, "name", None) == name:
            return value
    raise _wrong_module(group, name, f"a subclass of `{base.__name__}` whose `name` is `{name}`")


def find_pass(name: str) -> type[Pass]:
    """Return the pass called `name`; its module must define one `Pass` subclass of that name."""
    from ryzen_compile.spec.passes import Pass

    return find_class("passes", name, Pass)  # type: ignore[type-abstract]


def passes() -> Mapping[str, type[Pass]]:
    """Return every pass by name, sorted, without those that cannot be used: see `broken_members`."""
    return _usable_members("passes")[0]


def backends() -> Mapping[str, Backend]:
    """Return every backend by name, sorted, without those that cannot be used: see `broken_members`."""
    return _usable_members("backends")[0]


def broken_members(group: Literal["passes", "backends"]) -> Mapping[str, str]:
    """Return the members of `group` that cannot be imported or do not define what they must, each with the reason."""
    return _usable_members(group)[1]


@functools.cache
def _usable_members(group: str) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    find: Callable[[str], Any] = find_pass if group == "passes" else find_backend
    usable: dict[str, Any] = {}
    broken: dict[str, str] = {}
    for name in names(group):
        try:
            usable[name] = find(name)
        except RyzenError as error:
            broken[name] = error.message
    return usable, broken


def find_precision_pass() -> type[PrecisionPass]:
    """Return the pass that a build adds for `--fp16` and `--bf16`. Raises UsageError unless exactly one is registered."""
    from ryzen_compile.spec.precision_pass import PrecisionPass

    found = {name: cls for name, cls in passes().items() if issubclass(cls, PrecisionPass) and cls.is_default}
    if len(found) != 1:
        raise UsageError(
            f"{'several passes are' if found else 'no pass is'} the default conversion of the precision",
            hint=f"name one in --passes: {', '.join(found)}" if found else "name a pass in --passes",
        )
    return next(iter(found.values()))


def legalization_passes() -> tuple[type[LegalizationPass], ...]:
    """Return the passes that rewrite what backends do not compute, by name; `for_backend` makes one if it is needed."""
    from ryzen_compile.spec.legalization_pass import LegalizationPass

    return tuple(cls for cls in passes().values() if issubclass(cls, LegalizationPass))


def ops() -> Mapping[str, Op]:
    """Return every op by its ONNX name, sorted; a member of the group `ops` declares one op or a family of ops.

    Ops that cannot be imported or whose declaration is invalid are omitted: see `broken_ops`. Raises RyzenError if two
    packages provide ops of the same ONNX name.
    """
    return _ops()[0]


def broken_ops() -> Mapping[str, str]:
    """Return the members of the group `ops` whose ops are omitted, each with the reason."""
    return _ops()[1]


@functools.cache
def _ops() -> tuple[Mapping[str, Op], Mapping[str, str]]:
    from ryzen_compile.spec.op import Op
    from ryzen_compile.spec.op_validation import problems

    valid: dict[str, Op] = {}
    broken: dict[str, str] = {}
    for member in names("ops"):
        try:
            module = importlib.import_module(module_name("ops", member))
        except Exception as error:  # noqa: BLE001 - third-party code; `broken_ops` reports the error
            broken[member] = f"`{module_name('ops', member)}` cannot be imported: {type(error).__name__}: {error}"
            continue
        for value in vars(module).values():
            if not isinstance(value, Op):
                continue
            if problems_found := problems(value):
                broken[member] = f"`{value.name}` in `{module.__name__}` is not declared correctly: {'; '.join(problems_found)}"
            elif valid.setdefault(value.name, value) is not value:
                raise RyzenError(
                    f"two packages provide an op called `{value.name}`", hint="uninstall one of them, or rename its op"
                )
    return dict(sorted(valid.items())), broken


def find_op(name: str) -> Op:
    """Return the op whose ONNX name is `name`. Raises UsageError if there is none."""
    if name not in ops():
        reasons = [reason for reason in broken_ops().values() if name in reason]
        raise UsageError(f"there is no op `{name}`", hint="; ".join(reasons) or did_you_mean(name, [*ops()]))
    return ops()[name]


def is_recipe_reference(text: str) -> bool:
    """Return whether `text` has the form `recipe:NAME`, or `SOURCE:LOCATION` of a recipe source, such as `hf:FOLDER`."""
    source, colon, _ = text.partition(":")
    return bool(colon) and (source == "recipe" or source in _members("recipe_sources"))


def is_module_reference(text: str) -> bool:
    """Return whether `text` refers to a PyTorch module: `FILE.py:FUNCTION`, `recipe:NAME` or `hf:FOLDER`."""
    return is_script_reference(text) or is_recipe_reference(text)


def find_recipe(reference: str) -> Recipe:
    """Return the recipe that `reference` names: `NAME`, `recipe:NAME`, or `SOURCE:LOCATION` of a recipe source.

    Raises UsageError if there is none, and the errors of the recipe source.
    """
    from ryzen_compile.spec.recipe import Recipe

    source, _, location = reference.partition(":")
    if source != "recipe" and is_recipe_reference(reference):
        recipe: Recipe = _find_object("recipe_sources", source, "make_recipe")(location)
        return recipe
    name = reference.removeprefix("recipe:")
    if name.endswith(".onnx"):
        raise UsageError(
            f"`{name}` is an ONNX file, not a PyTorch module", hint=f"build it: ryzen-compile build {name} --gpu cpu"
        )
    if name not in _members("recipes") and is_hugging_face_folder(name):
        raise UsageError(f"`{name}` is a Hugging Face folder, not a recipe", hint=f"write hf:{name}")
    instances = [value for value in vars(_import_member("recipes", name)).values() if isinstance(value, Recipe)]
    if len(instances) != 1:
        raise _wrong_module("recipes", name, f"exactly one `Recipe` (it defines {len(instances)})")
    return instances[0]


def recipe_digest(reference: str) -> str:
    """Return a digest of the files that determine the recipe: modules and data files of a package, or those of a folder.

    `reference` is as for `find_recipe`; raises the same errors.
    """
    source, _, location = reference.partition(":")
    if source != "recipe" and is_recipe_reference(reference):
        digest: str = _find_object("recipe_sources", source, "recipe_digest")(location)
        return digest
    return module_digest(module_name("recipes", reference.removeprefix("recipe:")))


def find_backend(name: str) -> Backend:
    """Return the backend called `name`, which its module defines as `BACKEND`. Raises UsageError if there is none."""
    backend: Backend = _find_object("backends", name, "BACKEND")
    return backend


def find_command(name: str) -> Command:
    """Return the command called `name`, which its module defines as `command`. Raises UsageError if there is none."""
    command: Command = _find_object("commands", name, "command")
    return command


def source_path(group: str, name: str) -> Path:
    """Return the source file of the member `name` of `group` without importing it. Raises UsageError if there is none."""
    spec = importlib.util.find_spec(module_name(group, name))
    if spec is None or spec.origin is None:
        raise RyzenError(f"the {_SINGULAR[group]} `{name}` has no source file", hint="reinstall the package that provides it")
    return Path(spec.origin)


def summary(group: str, name: str) -> str:
    """Return the first line of the module of the member `name` of `group`, without importing it.

    Raises UsageError if there is no such member, RyzenError if its source cannot be read.
    """
    return summary_of(source_path(group, name).read_text(encoding="utf-8"))


def summary_of(source: str) -> str:
    """Return the first line of the docstring of a module, whose source starts with it, without the full stop."""
    return source.partition("\n")[0].strip().strip('"').rstrip(".")


def provider_packages(group: str) -> list[str]:
    """Return the sorted names of the packages that provide members of `group`."""
    return sorted({entry.module for entry in _entry_points(group)})


def properties() -> frozenset[Property]:
    """Return every property that a registered pass requires, ensures or invalidates."""
    return properties_of(passes().values())


def properties_of(passes: Iterable[Pass | type[Pass]]) -> frozenset[Property]:
    """Return every property that one of `passes` requires, ensures or invalidates."""
    return frozenset(item for pass_ in passes for item in pass_.requires | pass_.ensures | pass_.invalidates)
