"""SymPy is imported when a model needs it, and not before."""

import subprocess
import sys
from pathlib import Path

import msgspec
import onnx
import pytest

from ryzen_compile.processes.child_call import call_in_child

BEGIN = """
import importlib.util, sys
from ryzen_compile.utils.deferred_import import defer_sympy
defer_sympy()
assert importlib.util.find_spec("onnx_ir")
import inspect
import onnx_ir
inspect.getmodule(sys._getframe(0))
onnx_ir.SymbolicDim("n")
assert "sympy.core" not in sys.modules
"""


@pytest.mark.parametrize(
    "use",
    [
        "assert str(onnx_ir.SymbolicDim('n') + 1 + onnx_ir.SymbolicDim('n')) == '2*n + 1'",
        "onnx_ir.SymbolicDim(__import__('sympy').Symbol('n'))",
        "from sympy import Symbol; assert isinstance(Symbol('n'), sys.modules['sympy'].Expr)",
        "import sympy.core.add as add, sympy; assert add.Add(1, 2) == 3; assert sympy.core.add is add",
        "import importlib.util; assert importlib.util.find_spec('sympy').name == 'sympy'; import sympy; sympy.Add",
        "assert onnx_ir._core._symbolic_shapes.parse_symbolic_expression('floor(n / 2)').free_symbols",
    ],
)
def test_sympy_is_imported_when_it_is_used(use: str) -> None:
    subprocess.run([sys.executable, "-c", f"{BEGIN}\n{use}\nassert 'sympy.core' in sys.modules"], check=True)


def test_a_module_that_is_imported_already_stays() -> None:
    code = "import onnx_ir, sympy, sys\nfrom ryzen_compile.utils.deferred_import import defer_sympy\ndefer_sympy()\n"
    subprocess.run([sys.executable, "-c", code + "assert sys.modules['sympy'] is sympy"], check=True)


def test_the_program_reads_a_model_without_sympy(tmp_path: Path) -> None:
    """For a model with symbolic sizes, from a file to its description."""
    header = '<ir_version: 10, opset_import: ["" : 21]>'
    onnx.save(
        onnx.parser.parse_model(header + "g (float[n, 4] x) => (float[n, 4] y) { y = Relu (x) }"), tmp_path / "model.onnx"
    )
    code = """
import sys
from ryzen_compile.cli.main import main
try:
    main(["inspect", sys.argv[1]])
except SystemExit as end:
    assert end.code == 0
assert "onnx_ir" in sys.modules
assert "sympy.core" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.onnx")], check=True)


def test_child_processes_import_onnx_ir_without_sympy() -> None:
    imported = call_in_child("support.faulty_functions:import_onnx_ir", b"null", label="import")
    assert msgspec.json.decode(imported) is False
