"""Tests of source digests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ryzen_compile.errors import RyzenError
from ryzen_compile.utils.source_digest import module_digest, package_digest, package_of

FILES = {
    "digested/__init__.py": "",
    "digested/recipe/__init__.py": "from digested import _shared\nfrom . import data\n",
    "digested/recipe/data.py": "from .. import _relative\n",
    "digested/recipe/weights.bin": "1",
    "digested/_shared.py": "from digested._indirect import NAME\n",
    "digested/_indirect.py": "NAME = 1\n",
    "digested/_relative.py": "import digested.nested.module\n",
    "digested/nested/__init__.py": "",
    "digested/nested/module.py": "",
    "digested/nested/unused.py": "",
    "digested/unused.py": "",
}
USED = [name for name in FILES if "unused" not in name]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "digested"]:
        del sys.modules[name]


def digest_of_module() -> str:
    return module_digest.__wrapped__("digested.recipe")


def digest_of_package(exclude: frozenset[str] = frozenset()) -> str:
    return package_digest.__wrapped__("digested", exclude=exclude)


@pytest.mark.parametrize("name", FILES)
def test_a_module_digest_covers_its_folder_and_its_imports(root: Path, name: str) -> None:
    before = digest_of_module()
    (root / name).write_text(f"{FILES[name]}# changed\n")
    assert (digest_of_module() != before) == (name in USED)


@pytest.mark.parametrize("name", FILES)
def test_a_package_digest_covers_every_file_that_is_not_excluded(root: Path, name: str) -> None:
    excluded = frozenset({"recipe", "nested/unused.py"})
    before, before_without = digest_of_package(), digest_of_package(excluded)
    (root / name).write_text(f"{FILES[name]}# changed\n")
    assert digest_of_package() != before
    is_excluded = name.startswith("digested/recipe/") or name == "digested/nested/unused.py"
    assert (digest_of_package(excluded) == before_without) == is_excluded


def test_compiled_and_hidden_files_are_not_covered(root: Path) -> None:
    before = digest_of_package()
    for name in ("__pycache__/unused.cpython-311.pyc", ".cache/state.json", ".hidden"):
        (root / "digested" / name).parent.mkdir(exist_ok=True)
        (root / "digested" / name).write_text("")
    assert digest_of_package() == before


def test_moving_a_file_or_its_content_changes_the_digest(root: Path) -> None:
    before = digest_of_package()
    (root / "digested/unused.py").rename(root / "digested/renamed.py")
    assert digest_of_package() != before


def test_a_digest_does_not_depend_on_the_location_of_the_package(
    root: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digest_of_package(), digest_of_module()
    other = tmp_path_factory.mktemp("other")
    (root / "digested").rename(other / "digested")
    monkeypatch.syspath_prepend(other)
    assert (digest_of_package(), digest_of_module()) == before


def test_the_package_of_a_module_is_the_outermost_one_that_is_not_a_namespace(root: Path) -> None:
    assert package_of("digested.nested.module") == "digested"
    (root / "digested/__init__.py").unlink()
    assert package_of("digested.nested.module") == "digested.nested"
    assert package_of("json") == "json"


def test_a_single_module_is_its_own_package(root: Path) -> None:
    (root / "alone.py").write_text("A = 1\n")
    before = package_digest.__wrapped__("alone"), module_digest.__wrapped__("alone")
    (root / "alone.py").write_text("A = 2\n")
    assert package_digest.__wrapped__("alone") != before[0]
    assert module_digest.__wrapped__("alone") != before[1]


def test_a_package_without_files_is_refused(root: Path) -> None:
    with pytest.raises(RyzenError, match="the source files of `missing_package` cannot be found"):
        package_digest("missing_package")
