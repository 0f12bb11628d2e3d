"""The page on the architecture: its layout and its layers are those of the tree and of the import contracts."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.doc_pages import DOCS, ROOT, blocks

PAGE = DOCS / "architecture.md"
CORE = "layers of the core"


def contract(name: str) -> list[str]:
    """Return the layers of the import contract whose name begins with `name`, from the top."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (found,) = [one for one in config["tool"]["importlinter"]["contracts"] if one["name"].startswith(name)]
    layers: list[str] = found["layers"]
    return layers


def test_the_layers_on_the_page_are_those_of_the_import_contract() -> None:
    (block,) = [block for block in blocks(PAGE) if block.language == "text"]
    assert [line.partition("  ")[0] for line in block.text.splitlines()] == contract(CORE)


def test_the_packages_on_the_page_have_the_order_of_the_import_contract() -> None:
    names = [layer.removeprefix("ryzen_") for layer in contract("models -> passes")]
    assert f"Imports go one way: {' -> '.join([*names[:-1], 'core'])}." in PAGE.read_text(encoding="utf-8")


def test_every_module_of_the_core_is_in_a_layer() -> None:
    layered = {part.strip().split(".")[0] for layer in contract(CORE) for part in layer.split("|")}
    modules = {
        path.stem for path in (ROOT / "ryzen_compile").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert modules - layered == {"__init__"}


def layout() -> Iterator[tuple[str, str]]:
    """Yield (folder, name) of every file and folder that the layout of the page lists."""
    text = PAGE.read_text(encoding="utf-8").partition("## Layout")[2].partition("\n## ")[0]
    folders: list[tuple[int, str]] = []
    for match in re.finditer(r"^( {4,})(\S.*?)(?:  .*)?$", text, re.MULTILINE):
        indent = len(match[1])
        while folders and folders[-1][0] >= indent:
            folders.pop()
        parent = "".join(folder for _, folder in folders)
        for name in match[2].split():
            yield parent, name
        if match[2].endswith("/"):
            folders.append((indent, match[2].split()[-1]))


def test_the_layout_lists_files_and_folders_that_exist() -> None:
    listed = list(layout())
    assert len(listed) > 30
    assert [folder + name for folder, name in listed if not (ROOT / folder / name).exists()] == []


@pytest.mark.parametrize("package", ["ryzen_compile", "ryzen_compile/backends", "ryzen_compile/ir", "ryzen_compile/cli"])
def test_the_layout_lists_every_folder(package: str) -> None:
    listed = {f"{folder}{name}".rstrip("/") for folder, name in layout()}
    folders = {path.relative_to(ROOT).as_posix() for path in Path(ROOT, package).iterdir() if (path / "__init__.py").is_file()}
    assert folders <= listed
