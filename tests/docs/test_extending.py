"""The pages in docs/extending: their samples are the files of tests/acme, and their sessions are executed."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support.doc_pages import DOCS, Block, blocks, missing_line
from support.external_packages import ACME, environment, run_program

PAGES = sorted((DOCS / "extending").glob("*.md"))
SAMPLES = {
    "pass": "acme_passes/acme_round_weights.py",
    "backend": "acme_backends/acme_reference.py",
    "scorer": "acme_scores/acme_key_max.py",
    "op": "acme_ops/axpy",
    "recipe": "acme_recipes/acme_mlp.py",
    "verb": "acme_commands/acme_weights.py",
}
"""Page -> the file or folder that is the whole addition."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the model that the other pages use, which the sessions on the page about recipes create."""
    folder = tmp_path_factory.mktemp("recipe")
    run_sessions(DOCS / "extending" / "recipe.md", folder)
    return folder / "mlp.onnx"


def test_the_files_on_the_pages_are_those_of_the_package() -> None:
    shown = {block.file: block.text for page in PAGES for block in blocks(page) if block.file and block.language == "python"}
    assert {file: (ACME / file).read_text(encoding="utf-8") for file in shown} == shown
    shown_or_described = {*shown, "acme_passes/acme_scale_weights.py", "acme_ops/axpy/__init__.py"}
    modules = {path.relative_to(ACME).as_posix() for path in ACME.rglob("*.py")}
    assert {file for file in modules if not re.fullmatch(r"acme_\w+/__init__\.py", file)} <= shown_or_described


def test_the_entry_points_on_the_page_are_those_of_the_package() -> None:
    (text,) = (block.text for block in blocks(DOCS / "extending" / "README.md") if block.language == "toml")
    (installed,) = ACME.glob("*.dist-info/entry_points.txt")
    parser = configparser.ConfigParser()
    parser.read_string(installed.read_text(encoding="utf-8"))
    assert tomllib.loads(text)["project"]["entry-points"] == {section: dict(parser[section]) for section in parser.sections()}


@pytest.mark.parametrize("page", ["pass", "backend", pytest.param("scorer", marks=pytest.mark.slow), "op", "verb"])
def test_the_sessions_on_the_page_have_the_output_that_it_shows(page: str, model: Path, tmp_path: Path) -> None:
    shutil.copy(model, tmp_path)
    run_sessions(DOCS / "extending" / f"{page}.md", tmp_path)


def test_the_name_and_version_on_the_page_are_those_of_the_package() -> None:
    (text,) = (block.text for block in blocks(DOCS / "extending" / "README.md") if block.language == "toml")
    project = tomllib.loads(text)["project"]
    (metadata,) = ACME.glob("*.dist-info/METADATA")
    assert metadata.parent.name == f"{project['name']}-{project['version']}.dist-info"
    assert {f"Name: {project['name']}", f"Version: {project['version']}"} <= {
        *metadata.read_text(encoding="utf-8").splitlines()
    }


def test_every_page_is_tested() -> None:
    assert {page.stem for page in PAGES} == {"README", *SAMPLES}


def run_sessions(page: Path, folder: Path) -> None:
    """Run the console sessions and the scripts of a page in its order."""
    executable = [block for block in blocks(page) if block.language in ("console", "python") and not block.file]
    assert executable
    for block in executable:
        run_session(block, folder)


def run_session(block: Block, folder: Path) -> None:
    """Run the commands, or the Python script, of a block."""
    if block.language == "python":
        subprocess.run([sys.executable, "-c", block.text], cwd=folder, env=environment(folder), check=True)
        return
    for command in block.commands:
        result = run_program(*command.arguments, cwd=folder, exit_code=1 if command.fails else 0)
        missing = missing_line(command.expected, result.stdout + result.stderr)
        assert missing is None, f"`{command.line}` does not print `{missing}`:\n{result.stdout}{result.stderr}"


@pytest.mark.parametrize(
    ("output", "missing"), [("a  1\nb 2", None), ("x\na 1\ny\n b\n", None), ("b\na 1", "b..."), ("a 2\nb", "a 1")]
)
def test_a_missing_line_is_found(output: str, missing: str | None) -> None:
    assert missing_line(["a 1", "b..."], output) == missing


@pytest.mark.parametrize("page", SAMPLES)
def test_the_sample_is_the_only_addition_to_a_package(page: str, tmp_path: Path) -> None:
    """A package without members gains the member when the file or folder is copied into it; no other file changes."""
    sample = Path(SAMPLES[page])
    package, (dist_info,) = sample.parts[0], ACME.glob("*.dist-info")
    group = {"verb": "commands", "pass": "passes", "scorer": "kv_scores"}.get(page, f"{page}s")
    (tmp_path / "acme-1.0.dist-info").mkdir()
    shutil.copy(dist_info / "METADATA", tmp_path / "acme-1.0.dist-info")
    (tmp_path / "acme-1.0.dist-info" / "entry_points.txt").write_text(
        f"[ryzen_compile.{group}]\nacme = {package}:members\n", encoding="utf-8"
    )
    (tmp_path / package).mkdir()
    shutil.copy(ACME / package / "__init__.py", tmp_path / package)
    member = sample.stem.replace("_", "-")
    script = (
        f"import importlib; from ryzen_compile import registry; assert {member!r} {{}} registry.names({group!r});"
        f"[importlib.import_module(registry.module_name({group!r}, name)) for name in registry.names({group!r})]"
    )
    run = [sys.executable, "-c"]
    subprocess.run([*run, script.format("not in")], env=environment(tmp_path, (tmp_path,)), check=True)
    source = ACME / sample
    (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / sample)
    subprocess.run([*run, script.format("in")], env=environment(tmp_path, (tmp_path,)), check=True)
