"""Tests of the public API: its list of names and signatures, its documentation, its types, and its agreement with the CLI."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pydoc
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support import public_api

import ryzen_compile as rc
from ryzen_compile.backends.builder_options import OPTIONS, PRECISION_FLAGS
from ryzen_compile.builder.config import BuildConfig
from ryzen_compile.builder.rewrite import RewriteConfig
from ryzen_compile.evaluation.evaluate import EvaluationConfig
from ryzen_compile.numerics.compare_models import ComparisonConfig
from ryzen_compile.processes.limits import ResourceLimits
from ryzen_compile.runtime.bench import BenchConfig

ROOT = Path(rc.__file__).parents[1]
FUNCTIONS = [name for name in rc.__all__ if inspect.isfunction(getattr(rc, name))]
CONSOLE_OPTIONS = {"verbosity", "as_json"}
LIMITS = {"memory_limit_bytes", "time_limit_seconds"}


def parameters(name: str) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(getattr(rc, name)).parameters)


def fields_of(config: type[Any]) -> dict[str, Any]:
    """Return the default of every field of a configuration, which is a dataclass or a record."""
    fields: Any = dataclasses.fields(config) if dataclasses.is_dataclass(config) else msgspec.structs.fields(config)
    return {field.name: field.default for field in fields}


def command_options(name: str, subcommand: str | None = None) -> set[str]:
    """Return the parameters of a command by their Python names, without those of the console and of builder options."""
    command: Any = importlib.import_module(f"ryzen_compile.cli.commands.{name}").command
    if subcommand is not None:
        command = command.commands[subcommand]
    names = {parameter.name or "" for parameter in command.params} - CONSOLE_OPTIONS
    builder_options = {f"builder_{option.name}" for option in (*OPTIONS, *PRECISION_FLAGS)}
    return names - builder_options | ({"options", "precision"} if names & builder_options else set())


def test_the_documentation_lists_every_public_name_and_signature() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"## All names.*?```text\n(.*?)```", text, flags=re.DOTALL)
    assert listed == public_api.render() + "\n", (
        "the public API differs from docs/api.md: if the change is intended, put the output of `python -m support.public_api` "
        "there and describe the change in CHANGELOG.md"
    )


def test_the_documentation_lists_every_option_whose_keyword_has_another_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    table = text.partition("names of the options, except:")[2].partition("| function |")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", table, flags=re.MULTILINE)
    listed = {(name, option) for name, options, _ in rows for option in re.findall(r"`(--[\w-]+)", options)}
    renamed, builder_options = set(), set()
    for name in {*FUNCTIONS} - {"load", "export_steps", "rewrite_steps"}:
        for option in importlib.import_module(f"ryzen_compile.cli.commands.{name}").command.params:
            spellings = {spelling for spelling in option.opts if spelling.startswith("--")}
            if option.name.startswith("builder_"):
                builder_options |= {(name, spelling) for spelling in spellings}
            elif option.name not in CONSOLE_OPTIONS | LIMITS and not {s[2:].replace("-", "_") for s in spellings} & {
                *parameters(name)
            }:
                renamed |= {(name, spelling) for spelling in spellings}
    assert listed - builder_options == renamed
    assert "| all that run models | `--memory-limit GB`, `--time-limit SECONDS` |" in table
    assert len(listed & builder_options) == 3, "the options of builders are shown by examples"
    for name, _, cell in rows:
        keywords = {*re.findall(r"`(?:\w+_steps\()?(\w+)[`=]", cell)}
        assert keywords <= {*parameters(name), *parameters("rewrite_steps"), *parameters("export_steps")}, name


def test_every_public_name_exists_and_is_defined_once() -> None:
    assert len({*rc.__all__}) == len(rc.__all__)
    assert {*dir(rc)} >= {*rc.__all__}
    defined = {name: getattr(rc, name).__name__.removeprefix("ryzen_compile.") for name in rc.__all__}
    assert defined == {name: name for name in rc.__all__}
    with pytest.raises(AttributeError, match="has no attribute `biuld`"):
        rc.biuld  # noqa: B018


@pytest.mark.parametrize("name", FUNCTIONS)
def test_help_shows_every_keyword_with_its_type_and_description(name: str) -> None:
    text = pydoc.render_doc(getattr(rc, name), renderer=pydoc.plaintext)
    documented = re.findall(r"^ {8}(\w+): \S", text.partition("Args:")[2].partition("Raises:")[0], flags=re.MULTILINE)
    assert documented == [*parameters(name)]
    assert all(parameter.annotation is not parameter.empty for parameter in parameters(name).values())
    assert all(re.search(rf"\b{parameter}: ['\"]", text.splitlines()[2]) for parameter in parameters(name))
    assert "rc." + name + "(" in text.partition("Args:")[0]


def test_the_keywords_of_build_are_the_fields_of_its_configuration_and_the_options_of_the_command() -> None:
    keywords = {*parameters("build")}
    fields = {field.name: field.default for field in dataclasses.fields(BuildConfig)}
    assert len(LIMITS) == len(dataclasses.fields(ResourceLimits))
    assert keywords - {"model", "output", "allow_partial", "cache", "progress"} == {*fields} - {"limits"} | LIMITS
    assert keywords - {"progress"} == command_options("build") - {"no_cache", "onnx_file"}
    for name in keywords & {*fields} - {"options"}:
        assert parameters("build")[name].default == fields[name], name


def test_explain_takes_every_option_of_a_build_configuration() -> None:
    fields = {field.name for field in dataclasses.fields(BuildConfig)} - {"limits"}
    assert command_options("explain") == {"model", *fields}
    assert command_options("cache", "explain") == {"model", *fields}


@pytest.mark.parametrize(
    ("name", "config", "other_keywords", "renamed"),
    [
        ("compare", ComparisonConfig, {"candidate", "baseline", "bisect", "source", "progress", *LIMITS}, {}),
        (
            "evaluate",
            EvaluationConfig,
            {"candidate", "baseline", "data", "requirements", "quick", "graph", "variant", "backend"}
            | {"statistics", "progress", *LIMITS},
            {"require": "requirements"},
        ),
        (
            "bench",
            BenchConfig,
            {"candidate", "against", "graph", "variant", "shapes", "data", "seed", "progress", *LIMITS},
            {"warm_up": "warm_up_seconds", "duration": "seconds", "iterations": "min_iterations"},
        ),
        ("rewrite", RewriteConfig, {"model", "output", "weights", "progress", *LIMITS}, {}),
    ],
)
def test_keywords_are_the_fields_of_the_configuration_and_the_options_of_the_command(
    name: str, config: type[Any], other_keywords: set[str], renamed: dict[str, str]
) -> None:
    keywords, fields = {*parameters(name)}, fields_of(config)
    assert keywords - other_keywords == {*fields}
    options = {renamed.get(option, option) for option in command_options(name)}
    assert options - {"steps"} == keywords - {"progress"}  # `rewrite --steps` is `rewrite_steps`
    for field, default in fields.items():
        if default not in (dataclasses.MISSING, msgspec.NODEFAULT):
            assert parameters(name)[field].default == default, field


@pytest.mark.parametrize(
    ("name", "renamed"),
    [
        ("export", {"what": "model"}),
        ("export_steps", {"what": "model", "output": "folder"}),
        ("verify", {"baselines": "baseline"}),
    ],
)
def test_keywords_are_the_options_of_the_command(name: str, renamed: dict[str, str]) -> None:
    command = {"export_steps": "export"}.get(name, name)  # `export MODEL FOLDER/` is `export_steps`
    options = {renamed.get(option, option) for option in command_options(command)} - {"task"}  # `hf:FOLDER#TASK`
    only_of_steps = {"passes", "steps", "data"} if name == "export" else set()
    assert options - only_of_steps == {*parameters(name)} - {"progress"}


@pytest.mark.slow
def test_a_type_checker_sees_every_keyword_and_result(tmp_path: Path) -> None:
    program = tmp_path / "typed_program.py"
    program.write_bytes(Path(__file__).with_name("samples").joinpath("typed_program.py").read_bytes())
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    folders = [ROOT, *(ROOT / name for name in ("passes", "plugins", "models")), sysconfig.get_path("purelib"), *sys.path]
    (site_packages / "tree.pth").write_text("".join(f"{folder}\n" for folder in folders if str(folder)))
    heavy = "torch,onnxruntime,transformers,polygraphy,onnx,onnx_ir,onnxscript,numpy"
    sections = ",".join(f"mypy-{package}.*" for package in heavy.split(","))
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nstrict = true\n[{sections}]\nfollow_imports = skip\n")
    python = environment / "bin" / "python"
    options = ["--config-file", "mypy.ini", "--python-executable", str(python), "--cache-dir", "cache"]
    result = subprocess.run(
        [sys.executable, "-m", "mypy", *options, program.name], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    found = {int(line) for line in re.findall(r"^typed_program\.py:(\d+): error: ", result.stdout, flags=re.MULTILINE)}
    lines = program.read_text(encoding="utf-8").splitlines()
    expected = {number for number, line in enumerate(lines, start=1) if line.endswith("# error")}
    assert found == expected, result.stdout + result.stderr
    source = "\n".join(lines)
    assert [name for name in FUNCTIONS if f"rc.{name}(" not in source] == []


def test_every_package_declares_its_types() -> None:
    for package in ("ryzen_compile", "ryzen_passes", "ryzen_plugins", "ryzen_models"):
        assert Path(str(importlib.import_module(package).__file__)).with_name("py.typed").is_file()
