"""Packages that are installed but defective: every failure is one message that names the package or the member."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support import tiny_models
from support.external_packages import run_program

from ryzen_compile import registry


def install(folder: Path, group: str, **files: str) -> Path:
    """Write a distribution `broken` with the package `broken_members` of `files`, and an entry point in `group`."""
    package, dist_info = folder / "broken_members", folder / "broken-1.0.dist-info"
    package.mkdir(parents=True)
    dist_info.mkdir()
    for name, text in files.items():
        (package / f"{name}.py").write_text(text, encoding="utf-8")
    (dist_info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n", encoding="utf-8")
    (dist_info / "entry_points.txt").write_text(f"[ryzen_compile.{group}]\nb = broken_members:members\n", encoding="utf-8")
    return folder


LIST_ALL = "from ryzen_compile.registry import modules_of\n\n\ndef members():\n    return modules_of(__name__)\n"


@pytest.mark.parametrize(
    ("group", "files", "arguments", "message"),
    [
        ("passes", {"__init__": "import nothing"}, "passes", "the package `broken` cannot list its members"),
        ("passes", {"__init__": LIST_ALL, "bad": "import nothing"}, "passes bad", "the pass `bad` cannot be imported"),
        (
            "passes",
            {"__init__": LIST_ALL, "bad": ""},
            "passes bad",
            "does not define a subclass of `Pass` whose `name` is `bad`",
        ),
        ("recipes", {"__init__": LIST_ALL, "bad": ""}, "export bad bad.onnx", "exactly one `Recipe` (it defines 0)"),
        ("backends", {"__init__": LIST_ALL, "bad": ""}, "build m.onnx --backend bad", "the backend `bad` cannot be used"),
        ("commands", {"__init__": LIST_ALL, "bad": ""}, "bad", "does not define `command`"),
        ("commands", {"__init__": LIST_ALL, "build": ""}, "--help", "two packages provide the command `build`"),
    ],
)
def test_a_defective_package_is_named(group: str, files: dict[str, str], arguments: str, message: str, tmp_path: Path) -> None:
    packages = (install(tmp_path / "packages", group, **files),)
    error = run_program(*arguments.split(), cwd=tmp_path, packages=packages, exit_code=1).stderr
    assert message in error
    assert "uninstall" in error
    assert "Traceback" not in error


def test_a_pass_that_cannot_be_imported_does_not_affect_builds_without_it(tmp_path: Path) -> None:
    packages = (install(tmp_path / "packages", "passes", __init__=LIST_ALL, bad="import nothing"),)
    tiny_models.write(tmp_path / "m.onnx")
    run_program("build", "m.onnx", "--gpu", "cpu", "--fp16", "-q", cwd=tmp_path, packages=packages)
    run_program("explain", "m.onnx", "--gpu", "cpu", cwd=tmp_path, packages=packages)
    listing = run_program("passes", cwd=tmp_path, packages=packages)
    assert "\nfold " in listing.stdout
    assert listing.stderr.startswith("warning: left out: the pass `bad` cannot be imported")


def test_a_backend_that_cannot_be_imported_does_not_affect_others(tmp_path: Path) -> None:
    packages = (install(tmp_path / "packages", "backends", __init__=LIST_ALL, bad="import nothing"),)
    tiny_models.write(tmp_path / "m.onnx")
    run_program("build", "m.onnx", "--gpu", "cpu", "-q", cwd=tmp_path, packages=packages)
    run_program("run", "m.ryzen", cwd=tmp_path, packages=packages)
    listing = run_program("targets", cwd=tmp_path, packages=packages)
    assert listing.stderr.startswith("warning: left out: the backend `bad` cannot be imported")


def test_a_command_that_cannot_be_imported_is_still_listed(tmp_path: Path) -> None:
    files = {"__init__": LIST_ALL, "bad": '"""Do something."""\n\nimport nothing\n'}
    packages = (install(tmp_path / "packages", "commands", **files),)
    assert "Other commands:\n  bad  Do something\n" in run_program("--help", cwd=tmp_path, packages=packages).stdout
    assert "the command `bad` cannot be imported" in run_program("bad", cwd=tmp_path, packages=packages, exit_code=1).stderr
    run_program("passes", "-q", cwd=tmp_path, packages=packages)


def test_packages_with_members_are_found_without_reading_their_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    assert not registry.has_external_members("commands"), "this package does not count"
    dist_info = tmp_path / "other-1.0.dist-info"
    dist_info.mkdir()
    (dist_info / "entry_points.txt").write_text("[ryzen_compile.passes]\na = other:members\n", encoding="utf-8")
    assert not registry.has_external_members("commands")
    (dist_info / "entry_points.txt").write_text("[ryzen_compile.commands]\na = other:members\n", encoding="utf-8")
    assert registry.has_external_members("commands")


def test_the_help_does_not_import_the_metadata_of_packages() -> None:
    code = "import sys; from ryzen_compile.cli.main import run; run(['--help']); sys.exit('importlib.metadata' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0
