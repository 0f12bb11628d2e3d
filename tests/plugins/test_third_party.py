"""An op that comes in a package of its own, found by its entry point: listed, shown, compiled and checked as ours are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ACME = Path(__file__).parent.parent / "acme"


def ask(tmp_path: Path, *arguments: str, paths: tuple[Path, ...] = (ACME,), code: int = 0) -> Any:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "RYZEN_COMPILE_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", "from ryzen_compile.cli.main import main; main()", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout) if "--json" in arguments and not code else done.stdout + done.stderr


def test_it_is_listed_and_shown(tmp_path: Path) -> None:
    assert "AcmeAxpy" in [one["name"] for one in ask(tmp_path, "ops", "--json")]
    shown = ask(tmp_path, "ops", "show", "AcmeAxpy")
    assert "acme::AcmeAxpy (version 1)" in shown
    assert "z = factor * x + y" in shown
    assert "{BLOCK=256, num_warps=4}" in shown


def test_it_is_checked_and_compiled_and_that_is_remembered(tmp_path: Path) -> None:
    assert ask(tmp_path, "ops", "check", "AcmeAxpy", "--json")["AcmeAxpy"]["cases"] == 24
    assert ask(tmp_path, "ops", "compile", "AcmeAxpy", "--gpu", "sm75,sm120", "--json") == {"AcmeAxpy": 12}
    evidence = ask(tmp_path, "ops", "show", "AcmeAxpy", "--json")["evidence"]
    assert [(check["where"], check["cases"]) for check in evidence["checks"]] == [("interpreter", 24)]
    compiled = {sm: count for sm, count in evidence["compiled"].items() if count}
    assert compiled == {"sm75": 6, "sm120": 6}


def copy(folder: Path, old: str, new: str, file: str) -> Path:
    """Return a copy of the package in which `old` reads `new`."""
    for path in ACME.rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            target = folder / path.relative_to(ACME)
            target.parent.mkdir(parents=True, exist_ok=True)
            text = path.read_text(encoding="utf-8")
            assert path.name != file or old in text
            target.write_text(text.replace(old, new) if path.name == file else text, encoding="utf-8")
    return folder


def test_a_kernel_that_does_something_else_is_noticed_and_not_remembered(tmp_path: Path) -> None:
    wrong = copy(tmp_path / "wrong", "FACTOR * tl.load", "-FACTOR * tl.load", "kernel.py")
    said = ask(tmp_path, "ops", "check", "AcmeAxpy", paths=(wrong,), code=1)
    assert "kernel and reference disagree: `z` differs in" in said
    assert ask(tmp_path, "ops", "show", "AcmeAxpy", "--json", paths=(wrong,))["evidence"]["checks"] == []


def test_a_change_of_the_kernel_forgets_what_was_known(tmp_path: Path) -> None:
    ask(tmp_path, "ops", "check", "AcmeAxpy")
    ask(tmp_path, "ops", "compile", "AcmeAxpy", "--gpu", "sm89")
    other = copy(tmp_path / "other", "one block", "a block", "kernel.py")
    evidence = ask(tmp_path, "ops", "show", "AcmeAxpy", "--json", paths=(other,))["evidence"]
    assert evidence["checks"] == []
    assert set(evidence["compiled"].values()) == {0}


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        (
            "kernel.py",
            "count, z, FACTOR",
            "z, count, FACTOR",
            "the kernel takes (x, y, z, count, FACTOR, BLOCK), and is",
        ),
        ("kernel.py", "tl.store(z + i, wide, mask", "tl.store(z + j, wide, mask", "NameError"),
        ("kernel.py", "import triton.language as tl", "import nothing_of_the_kind", "nothing_of_the_kind"),
    ],
)
def test_a_kernel_that_cannot_be_compiled_is_refused_by_name(tmp_path: Path, file: str, old: str, new: str, says: str) -> None:
    broken = copy(tmp_path / "broken", old, new, file)
    said = ask(tmp_path, "ops", "compile", "AcmeAxpy", "--gpu", "sm89", paths=(broken,), code=1)
    assert "AcmeAxpy[float32] N=1024 D=1024 factor=2.0 tactic 0 cannot be compiled for sm89" in said
    assert says in said
    assert "Traceback" not in said


def test_a_kernel_that_writes_outside_of_its_tensors_is_caught(tmp_path: Path) -> None:
    wild = copy(tmp_path / "wild", "wide, mask=i < count", "wide", "kernel.py")
    said = ask(tmp_path, "ops", "check", "AcmeAxpy", paths=(wild,), code=1)
    assert "the kernel wrote outside of `z`" in said


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        (
            "op.py",
            "import numpy as np",
            "import nothing_here",
            "cannot be imported: ModuleNotFoundError: No module named 'nothing_here'",
        ),
        ("op.py", '"N": 1024, "D"', '"D"', "is not whole: `typical` does not say what N is"),
        ("op.py", '"ceil_div(N * D, BLOCK)"', '"ceil_div(M, BLOCK)"', "is not whole: the grid speaks of `M`, which is no dim"),
        ("op.py", "    draw=_draw,\n", "", "is not whole: an op with a kernel needs `draw` and `cases`"),
    ],
)
def test_a_declaration_that_is_not_whole_is_left_out_and_hurts_nobody(
    tmp_path: Path, file: str, old: str, new: str, says: str
) -> None:
    broken = copy(tmp_path / "broken", old, new, file)
    listed = ask(tmp_path, "ops", paths=(broken,))
    assert "left out: " in listed
    assert says in listed
    assert "KVAppendEvict" in listed
    asked = ask(tmp_path, "ops", "show", "AcmeAxpy", paths=(broken,), code=2)
    assert "there is no op `AcmeAxpy`" in asked
    assert "Traceback" not in listed + asked


@pytest.mark.parametrize(
    ("old", "new", "says"),
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
            'Port("x", "T", "N D"), Port("y", "T", "N D")',
            'Port("y", "T", "N D"), Port("x", "T", "N D")',
            "its reference has ['x', 'y']",
        ),
    ],
)
def test_a_reference_that_is_not_the_declared_one_is_refused(tmp_path: Path, old: str, new: str, says: str) -> None:
    broken = copy(tmp_path / "broken", old, new, "op.py")
    said = ask(tmp_path, "ops", "check", "AcmeAxpy", paths=(broken,), code=1)
    assert says in said
    assert "Traceback" not in said


def test_our_tests_of_every_op_run_for_it(tmp_path: Path) -> None:
    """But for those that speak of a page, which it has not."""
    environment = {**os.environ, "PYTHONPATH": str(ACME), "RYZEN_COMPILE_CACHE": str(tmp_path / "cache")}
    tests = [str(Path(__file__).with_name("test_ops.py")), str(ACME.parent / "kernels" / "test_aot.py")]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests, "-k", "AcmeAxpy and not declaration"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ACME.parent.parent)
    assert done.returncode == 0, done.stdout
    assert "7 passed" in done.stdout


def test_two_packages_of_one_op_are_told_apart(tmp_path: Path) -> None:
    """Another package offers an op of the same ONNX name from a folder of another name."""
    other = tmp_path / "other"
    for path in ACME.rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            name = str(path.relative_to(ACME)).replace("acme_ops", "zeta_ops").replace("axpy/", "zaxpy/")
            (other / name).parent.mkdir(parents=True, exist_ok=True)
            text = path.read_text(encoding="utf-8").replace("acme_ops", "zeta_ops").replace("acme-ops", "zeta-ops")
            (other / name).write_text(text.replace(".axpy.", ".zaxpy.").replace("acme =", "zeta ="), encoding="utf-8")
    said = ask(tmp_path, "ops", paths=(ACME, other), code=1)
    assert "two packages offer an op called `AcmeAxpy`" in said


def test_a_model_that_holds_it_is_built_and_run(tmp_path: Path) -> None:
    write = (
        "import sys; from ryzen_compile.ops.equivalence import model_of; from ryzen_compile.registry import find_op;"
        "model = model_of(find_op('AcmeAxpy'), {'T': 'float32'}, {'factor': 2.0}, {'D': 8});"
        "open(sys.argv[1], 'wb').write(model.SerializeToString())"
    )
    environment = {**os.environ, "PYTHONPATH": str(ACME)}
    subprocess.run([sys.executable, "-c", write, tmp_path / "m.onnx"], env=environment, check=True)
    package = str(tmp_path / "m.ryzen")
    ask(
        tmp_path, "build", str(tmp_path / "m.onnx"), "-o", package, "--gpu", "cpu,sm86,sm120", "--fp16", "--max-shapes", "x:4x8"
    )
    manifest = ask(tmp_path, "inspect", package, "--json")
    assert [[target["name"] for target in engine["targets"]] for engine in manifest["engines"]] == [["sm86", "sm120"]]
    assert "z" in ask(tmp_path, "run", package)
