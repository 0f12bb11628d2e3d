"""Tests of callables of Python files, and of error messages if they fail."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ryzen_compile.errors import RyzenError, UsageError
from ryzen_compile.utils.user_script import call_user_function, is_script_reference, load_callable, split_script_reference


def write_script(folder: Path, text: str, name: str = "my.py") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


@pytest.mark.parametrize(
    ("text", "file", "name"),
    [
        ("a.py:make", "a.py", "make"),
        ("a.py", "a.py", None),
        ("C:\\x\\a.py", "C:\\x\\a.py", None),
        ("C:\\a.py:f", "C:\\a.py", "f"),
    ],
)
def test_name_follows_the_last_colon(text: str, file: str, name: str | None) -> None:
    assert split_script_reference(text) == (file, name)


def test_script_references_are_recognized() -> None:
    assert is_script_reference("a.py:make")
    assert not is_script_reference("minilm")
    assert not is_script_reference("model.onnx")


def test_callable_can_import_modules_of_its_folder(tmp_path: Path) -> None:
    write_script(tmp_path, "VALUE = 4", "neighbor_of_my.py")
    path = write_script(tmp_path, "def make():\n    import neighbor_of_my\n    return neighbor_of_my.VALUE")
    assert call_user_function(path, load_callable(f"{path}:make")) == 4


def test_two_files_of_the_same_name_are_separate(tmp_path: Path) -> None:
    paths = []
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        paths.append(write_script(tmp_path / str(number), f"def make(): return {number}"))
    assert [load_callable(f"{path}:make")() for path in paths] == [1, 2]


def test_default_name_is_used_without_a_name(tmp_path: Path) -> None:
    path = write_script(tmp_path, "def load_data(): return 1")
    assert load_callable(path, default="load_data")() == 1
    with pytest.raises(UsageError, match="names no callable"):
        load_callable(path)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RyzenError, match="there is no file"):
        load_callable(f"{tmp_path}/none.py:make")
    with pytest.raises(RyzenError, match="there is no file"):
        load_callable(f"{tmp_path}:make")


def test_file_that_is_not_python_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a Python file"):
        load_callable(f"{write_script(tmp_path, '', 'my.txt')}:make")


def test_missing_callable_has_a_hint(tmp_path: Path) -> None:
    path = write_script(tmp_path, "def make(): ...\nNUMBER = 3")
    with pytest.raises(UsageError, match="has no `mak`\n\nhint: did you mean `make`"):
        load_callable(f"{path}:mak")
    with pytest.raises(UsageError, match="holds a int, not a callable, as `NUMBER`"):
        load_callable(f"{path}:NUMBER")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n1 / 0", r"ZeroDivisionError: division by zero \(my.py, line 2\)"),
        ("def (", r"SyntaxError: invalid syntax \(my.py, line 1\)"),
        ("raise SystemExit('bye')", r"SystemExit: bye \(my.py, line 1\)"),
        ("raise ValueError", r"ValueError: no reason given \(my.py, line 1\)"),
        ("import no_such_module_anywhere", r"(?s)ModuleNotFoundError: .*hint: pip install no_such_module_anywhere"),
    ],
)
def test_failing_file_is_reported_with_its_location_and_unloaded(tmp_path: Path, text: str, message: str) -> None:
    before = set(sys.modules)
    with pytest.raises(RyzenError, match=message):
        load_callable(f"{write_script(tmp_path, text)}:make")
    assert not [name for name in set(sys.modules) - before if name.startswith("ryzen_script")]


def test_failing_function_is_reported_with_its_location() -> None:
    with pytest.raises(RyzenError, match=r"`it` failed: KeyError: 'a' \(test_user_script.py, line"):
        call_user_function("it", lambda: {}["a"])


def test_ryzen_error_is_not_converted() -> None:
    def refuse() -> None:
        raise UsageError("no")

    with pytest.raises(UsageError, match="^no$"):
        call_user_function("it", refuse)
