"""Tests of diagnostics: their codes, their text, and their place in the JSON output of commands."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import tiny_models

import ryzen_compile
from ryzen_compile.cli.main import run
from ryzen_compile.diagnostic import CODES, Diagnostic
from ryzen_compile.errors import BackendError, PipelineError
from ryzen_compile.pipeline import rules
from ryzen_compile.report.diagnostics import format_diagnostics

ROOT = Path(ryzen_compile.__file__).parents[1]
SOURCES = [path for folder in ("ryzen_compile", "passes", "plugins", "models") for path in (ROOT / folder).rglob("*.py")]
KEYS = {"code", "severity", "message", "location", "hint"}


def constants_in(node: ast.expr) -> Iterator[str]:
    """Yield the strings that an expression may evaluate to: those of a constant, or of both branches of a condition."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.IfExp):
        yield from constants_in(node.body)
        yield from constants_in(node.orelse)


def code_values(node: ast.AST) -> Iterator[ast.expr]:
    """Yield the expressions that a statement gives to a code: `code=...`, `code = ...` and `_warn_once(CODE, ...)`."""
    if isinstance(node, ast.keyword) and node.arg == "code":
        yield node.value
    elif isinstance(node, ast.Assign):
        for target in node.targets:
            names = target.elts if isinstance(target, ast.Tuple) else [target]
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            yield from (value for name, value in zip(names, values, strict=False) if ast.unparse(name) == "code")
    elif isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "code" and node.value is not None:
        yield node.value
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "_warn_once":
        yield node.args[0]


def emitted_codes(source: Path) -> set[str]:
    """Return the codes that a module gives to diagnostics and errors."""
    nodes = ast.walk(ast.parse(source.read_text(encoding="utf-8")))
    return {code for node in nodes for value in code_values(node) for code in constants_in(value)}


def test_the_table_of_codes_holds_every_code_of_the_source_and_no_other() -> None:
    emitted = {code: path for path in SOURCES for code in emitted_codes(path)}
    assert {code: path.name for code, path in emitted.items() if code not in CODES} == {}
    assert set(CODES) - set(emitted) == set()


def test_the_documentation_shows_the_table_of_codes_and_rules() -> None:
    text = (ROOT / "docs" / "diagnostics.md").read_text(encoding="utf-8")
    rows = [line for line in text.partition("## Codes")[2].splitlines() if line.startswith("| `")]
    shipped_rules = {rule.code: rule.reason for rule in rules.load_rules() if f"`{rule.code}`" in text}
    assert rows == [f"| `{code}` | {meaning} |" for code, meaning in {**CODES, **shipped_rules}.items()]


def test_a_diagnostic_is_printed_with_severity_location_code_and_hint() -> None:
    error = Diagnostic(code="shape", severity="error", message="it is too large", location="x", hint="use less")
    info = Diagnostic(code="cache-hit", severity="info", message="taken from the cache", location="m.plan")
    other = Diagnostic(code="model", severity="warning", message="it is old", hint="use less")
    assert format_diagnostics([info]) == "m.plan: taken from the cache"
    assert format_diagnostics([error, other, info], indent="  ").splitlines() == [
        "  error: x: it is too large [shape]",
        "  warning: it is old [model]",
        "  hint: use less",
        "  m.plan: taken from the cache",
    ]
    assert "\033[31;1merror: \033[0mx: it" in format_diagnostics([error], colors=True)


def test_an_error_carries_one_diagnostic_for_each_problem() -> None:
    problems = [
        Diagnostic(code="target-refused", severity="error", message="no library", location="h200", hint="install it"),
        Diagnostic(code="target-refused", severity="error", message="no library", location="b200", hint="install it"),
        Diagnostic(code="package-written", severity="info", message="it is in m.ryzen"),
    ]
    error = BackendError.of(problems)
    assert error.diagnostics == tuple(problems)
    assert error.message == "h200: no library; b200: no library; it is in m.ryzen"
    assert error.hint == "install it"
    single = PipelineError("the pass failed", location="/a/3", code="pass-failed")
    assert single.diagnostics == (Diagnostic(code="pass-failed", severity="error", message="the pass failed", location="/a/3"),)
    assert single.message == "/a/3: the pass failed"
    assert PipelineError("no").diagnostics[0].code == "pipeline"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("diagnostics")
    tiny_models.write(path / "small.onnx")
    tiny_models.write(path / "other.onnx", seed=9)
    assert run(["build", str(path / "small.onnx"), "--gpu", "cpu", "--cache", str(path / "cache"), "-q"]) == 0
    return path


@pytest.mark.parametrize(
    ("arguments", "exit_code", "keys", "codes"),
    [
        (
            ["build", "small.onnx", "-o", "a.ryzen", "--gpu", "cpu", "--cache", "cache"],
            0,
            {"path", "manifest"},
            {"cache-hit", "shapes-derived"},
        ),
        (
            ["build", "small.onnx", "-o", "b.ryzen", "--gpu", "cpu,h200", "--no-compare", "--no-cache"],
            1,
            set(),
            {"target-refused", "package-written"},
        ),
        (
            ["build", "small.onnx", "-o", "c.ryzen", "--gpu", "cpu,h200", "--no-compare", "--no-cache", "--allow-partial"],
            0,
            {"path", "manifest"},
            {"target-refused", "not-compared"},
        ),
        (["build", "small.onnx", "--gpu", "sm88"], 2, set(), {"usage"}),
        (["build", "small.onnx", "--biuld"], 2, set(), {"usage"}),
        (
            ["build", "small.onnx", "-p", "kv-quant,kv-quant", "--no-cache"],
            1,
            set(),
            {"pipeline"},
        ),
        (["inspect", "small.ryzen"], 0, {"path", "manifest"}, set()),
        (["inspect", "nothing.ryzen"], 1, set(), {"package"}),
        (
            ["explain", "small.onnx", "--gpu", "cpu,h200", "--fp16"],
            1,
            {"graphs", "refused_targets"},
            {"target-refused", "pass-left-out", "option-translated"},
        ),
        (["compare", "small.ryzen", "--baseline", "small.onnx"], 0, {"comparisons", "met", "divergence"}, set()),
        (["compare", "other.onnx", "--baseline", "small.onnx"], 1, {"comparisons", "met", "divergence"}, {"criterion-not-met"}),
        (["rewrite", "small.onnx", "folded.onnx", "-p", "fold"], 0, {"graphs"}, {"pass-changed"}),
        (["rewrite", "small.onnx", "small.onnx", "-p", "fold"], 1, set(), {"refused"}),
        (["run", "small.ryzen"], 0, {"choice", "outputs"}, {"engine-chosen"}),
        (["bench", "small.ryzen", "--duration", "0", "--warm-up", "0"], 0, {"timings", "ratio"}, {"engine-chosen"}),
        (["verify", "small.ryzen", "--baseline", "other.onnx"], 1, {"path", "manifest", "comparisons"}, {"criterion-not-met"}),
        (["passes"], 0, {"passes"}, set()),
        (["passes", "fold"], 0, {"name", "options"}, set()),
        (["ops"], 0, {"ops"}, set()),
        (["targets"], 0, {"here", "builders"}, set()),
        (["doctor"], 0, {"gpus", "packages", "backends"}, {"backend-available"}),
        (["cache", "--folder", "cache", "ls"], 0, {"entries"}, set()),
        (["cache", "--folder", "cache", "stats"], 0, {"size_bytes"}, set()),
        (["pack", "small.ryzen", "small.tar"], 0, {"path", "size_bytes"}, set()),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_json_output_of_every_command_holds_its_diagnostics(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    exit_code: int,
    keys: set[str],
    codes: set[str],
) -> None:
    monkeypatch.chdir(folder)
    assert run([*arguments, "--json"]) == exit_code
    document = json.loads(capsys.readouterr().out)
    assert {*document} >= keys | {"diagnostics"}
    assert all({*diagnostic} == KEYS for diagnostic in document["diagnostics"])
    assert {diagnostic["code"] for diagnostic in document["diagnostics"]} >= codes
    severities = {diagnostic["severity"] for diagnostic in document["diagnostics"]}
    assert ("error" in severities) == (exit_code != 0)
    assert all(diagnostic["code"] in CODES for diagnostic in document["diagnostics"])


def test_every_problem_of_a_pipeline_is_one_diagnostic(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert run(["rewrite", "small.onnx", "out.onnx", "-p", "kv-quant,kv-quant", "--json"]) == 1
    output = capsys.readouterr()
    diagnostics = json.loads(output.out)["diagnostics"]
    assert [(one["code"], one["location"]) for one in diagnostics] == [
        ("property-missing", "kv-quant"),
        ("property-invalidated", "kv-quant"),
    ]
    assert output.err.count("error: ") == 2
    assert "[property-missing]\nhint: " in output.err
    assert "[property-invalidated]\nhint: list `kv-quant` once\n" in output.err
