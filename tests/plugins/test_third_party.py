"""An op from a third-party package, found by its entry point, is listed, shown, compiled and checked like built-in ops."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.external_packages import ACME, copy_acme, environment, run_program


def run_cli(tmp_path: Path, *arguments: str, paths: tuple[Path, ...] = (ACME,), exit_code: int = 0) -> Any:
    result = run_program(*arguments, cwd=tmp_path, packages=paths, exit_code=exit_code)
    return json.loads(result.stdout) if "--json" in arguments and not exit_code else result.stdout + result.stderr


def test_the_op_is_listed_and_shown(tmp_path: Path) -> None:
    assert "AcmeAxpy" in [op["name"] for op in run_cli(tmp_path, "ops", "--json")["ops"]]
    shown = run_cli(tmp_path, "ops", "show", "AcmeAxpy")
    assert "acme::AcmeAxpy (version 1)" in shown
    assert "z = factor * x + y" in shown
    assert "{BLOCK=256, num_warps=4}" in shown


def test_the_op_is_checked_and_compiled_and_the_results_are_cached(tmp_path: Path) -> None:
    assert run_cli(tmp_path, "ops", "check", "AcmeAxpy", "--json")["checks"]["AcmeAxpy"]["cases"] == 24
    assert run_cli(tmp_path, "ops", "compile", "AcmeAxpy", "--gpu", "sm75,sm120", "--json")["compiled"] == {"AcmeAxpy": 12}
    verification = run_cli(tmp_path, "ops", "show", "AcmeAxpy", "--json")["verification"]
    assert [(check["machine"], check["cases"]) for check in verification["checks"]] == [("interpreter", 24)]
    compiled = {sm: count for sm, count in verification["compiled_counts"].items() if count}
    assert compiled == {"sm75": 6, "sm120": 6}


def test_a_wrong_kernel_is_detected_and_not_recorded(tmp_path: Path) -> None:
    broken = copy_acme(tmp_path / "broken", {"kernel.py": ("FACTOR * tl.load", "-FACTOR * tl.load")})
    output = run_cli(tmp_path, "ops", "check", "AcmeAxpy", paths=(broken,), exit_code=1)
    assert "kernel and reference differ: `z` differs in" in output
    assert run_cli(tmp_path, "ops", "show", "AcmeAxpy", "--json", paths=(broken,))["verification"]["checks"] == []


def test_a_change_of_the_kernel_invalidates_the_cached_results(tmp_path: Path) -> None:
    run_cli(tmp_path, "ops", "check", "AcmeAxpy")
    run_cli(tmp_path, "ops", "compile", "AcmeAxpy", "--gpu", "sm89")
    changed = copy_acme(tmp_path / "other", {"kernel.py": ("one program per block", "a program per block")})
    verification = run_cli(tmp_path, "ops", "show", "AcmeAxpy", "--json", paths=(changed,))["verification"]
    assert verification["checks"] == []
    assert set(verification["compiled_counts"].values()) == {0}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("count, z, FACTOR", "z, count, FACTOR", "the kernel takes (x, y, z, count, FACTOR, BLOCK), but is"),
        ("tl.store(z + i, wide, mask", "tl.store(z + j, wide, mask", "NameError"),
        ("import triton.language as tl", "import nothing_of_the_kind", "nothing_of_the_kind"),
    ],
)
def test_a_kernel_that_cannot_be_compiled_is_reported_with_its_specialization(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    broken = copy_acme(tmp_path / "broken", {"kernel.py": (old, new)})
    output = run_cli(tmp_path, "ops", "compile", "AcmeAxpy", "--gpu", "sm89", paths=(broken,), exit_code=1)
    assert "AcmeAxpy[float32] N=1024 D=1024 factor=2.0 tactic 0 cannot be compiled for sm89" in output
    assert message in output
    assert "Traceback" not in output


def test_a_kernel_that_writes_outside_of_its_tensors_is_detected(tmp_path: Path) -> None:
    broken = copy_acme(tmp_path / "wild", {"kernel.py": ("wide, mask=i < count", "wide")})
    output = run_cli(tmp_path, "ops", "check", "AcmeAxpy", paths=(broken,), exit_code=1)
    assert "the kernel wrote outside of `z`" in output


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "import numpy as np",
            "import nothing_here",
            "cannot be imported: ModuleNotFoundError: No module named 'nothing_here'",
        ),
        ('"N": 1024, "D"', '"D"', "is not declared correctly: `typical_dims` must set N"),
        (
            '"ceil_div(N * D, BLOCK)"',
            '"ceil_div(M, BLOCK)"',
            "is not declared correctly: the grid refers to `M`, which is not defined",
        ),
        (
            "    make_inputs=_make_inputs,\n",
            "",
            "is not declared correctly: an op with a kernel must declare `make_inputs` and `test_cases`",
        ),
    ],
)
def test_an_invalid_declaration_is_omitted_without_affecting_other_ops(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    broken = copy_acme(tmp_path / "broken", {"op.py": (old, new)})
    listing = run_cli(tmp_path, "ops", paths=(broken,))
    assert "left out: " in listing
    assert message in listing
    assert "KVAppendEvict" in listing
    error = run_cli(tmp_path, "ops", "show", "AcmeAxpy", paths=(broken,), exit_code=2)
    assert "there is no op `AcmeAxpy`" in error
    assert "Traceback" not in listing + error


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "acme_ops.axpy.reference:AcmeAxpy",
            "acme_ops.axpy.nowhere:AcmeAxpy",
            "`acme_ops.axpy.nowhere:AcmeAxpy` cannot be loaded",
        ),
        (
            "acme_ops.axpy.reference:AcmeAxpy",
            "acme_ops.axpy.reference:Other",
            "`acme_ops.axpy.reference:Other` cannot be loaded",
        ),
        (
            'TensorParam("x", "T", "N D"), TensorParam("y", "T", "N D")',
            'TensorParam("y", "T", "N D"), TensorParam("x", "T", "N D")',
            "its reference has ['x', 'y']",
        ),
    ],
)
def test_a_reference_that_does_not_match_the_declaration_is_rejected(tmp_path: Path, old: str, new: str, message: str) -> None:
    broken = copy_acme(tmp_path / "broken", {"op.py": (old, new)})
    output = run_cli(tmp_path, "ops", "check", "AcmeAxpy", paths=(broken,), exit_code=1)
    assert message in output
    assert "Traceback" not in output


def test_the_generic_op_tests_pass_for_the_op(tmp_path: Path) -> None:
    """All tests except those of the declaration, which require a README."""
    tests = [str(Path(__file__).with_name("test_ops.py")), str(ACME.parent / "kernels" / "test_aot.py")]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        *tests,
        "-k",
        "AcmeAxpy and not declaration",
        "-m",
        "not exhaustive",
    ]
    result = subprocess.run(
        command, env=environment(tmp_path), capture_output=True, text=True, check=False, cwd=ACME.parent.parent
    )
    assert result.returncode == 0, result.stdout
    assert "7 passed" in result.stdout


def test_two_packages_with_the_same_op_are_reported(tmp_path: Path) -> None:
    """Another package provides an op of the same ONNX name from a folder of another name."""
    other = tmp_path / "other"
    for path in ACME.rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            name = (
                str(path.relative_to(ACME))
                .replace("acme_ops", "zeta_ops")
                .replace("acme-1.0", "zeta-1.0")
                .replace("axpy/", "zaxpy/")
            )
            (other / name).parent.mkdir(parents=True, exist_ok=True)
            text = path.read_text(encoding="utf-8").replace("acme_ops", "zeta_ops").replace("Name: acme", "Name: zeta")
            (other / name).write_text(text.replace(".axpy.", ".zaxpy.").replace("acme =", "zeta ="), encoding="utf-8")
    output = run_cli(tmp_path, "ops", paths=(ACME, other), exit_code=1)
    assert "two packages provide an op called `AcmeAxpy`" in output


def test_a_model_with_the_op_is_built_and_run(tmp_path: Path) -> None:
    write = (
        "import sys; from ryzen_compile.ops.equivalence import single_op_model; from ryzen_compile.registry import find_op;"
        "model = single_op_model(find_op('AcmeAxpy'), {'T': 'float32'}, {'factor': 2.0}, {'D': 8});"
        "open(sys.argv[1], 'wb').write(model.SerializeToString())"
    )
    subprocess.run([sys.executable, "-c", write, tmp_path / "m.onnx"], env=environment(tmp_path), check=True)
    package = str(tmp_path / "m.ryzen")
    run_cli(
        tmp_path, "build", str(tmp_path / "m.onnx"), "-o", package, "--gpu", "cpu,sm86,sm120", "--fp16", "--max-shapes", "x:4x8"
    )
    manifest = run_cli(tmp_path, "inspect", package, "--json")["manifest"]
    assert [[target["name"] for target in engine["targets"]] for engine in manifest["engines"]] == [["sm86", "sm120"]]
    assert "z" in run_cli(tmp_path, "run", package)
