"""Callables of Python files, and what is said where they fail."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ryzen_compile.errors import RyzenError, UsageError
from ryzen_compile.utils.user_script import call_user_function, is_script_reference, load_callable, split_script_reference


def write(folder: Path, text: str, name: str = "my.py") -> str:
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
def test_the_name_is_behind_the_last_colon(text: str, file: str, name: str | None) -> None:
    assert split_script_reference(text) == (file, name)


def test_a_script_is_told_from_other_names() -> None:
    assert is_script_reference("a.py:make")
    assert not is_script_reference("minilm")
    assert not is_script_reference("model.onnx")


def test_the_callable_is_found_and_may_import_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, "VALUE = 4", "neighbour_of_my.py")
    path = write(tmp_path, "def make():\n    import neighbour_of_my\n    return neighbour_of_my.VALUE")
    assert call_user_function(path, load_callable(f"{path}:make")) == 4


def test_two_files_of_one_name_do_not_mix(tmp_path: Path) -> None:
    paths = []
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        paths.append(write(tmp_path / str(number), f"def make(): return {number}"))
    assert [load_callable(f"{path}:make")() for path in paths] == [1, 2]


def test_a_default_name_stands_in(tmp_path: Path) -> None:
    path = write(tmp_path, "def load_data(): return 1")
    assert load_callable(path, default="load_data")() == 1
    with pytest.raises(UsageError, match="names no callable"):
        load_callable(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RyzenError, match="there is no file"):
        load_callable(f"{tmp_path}/none.py:make")
    with pytest.raises(RyzenError, match="there is no file"):
        load_callable(f"{tmp_path}:make")


def test_a_file_that_is_no_python_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a Python file"):
        load_callable(f"{write(tmp_path, '', 'my.txt')}:make")


def test_a_missing_callable_gets_a_hint(tmp_path: Path) -> None:
    path = write(tmp_path, "def make(): ...\nNUMBER = 3")
    with pytest.raises(UsageError, match="has no `mak`\n\nhint: did you mean `make`"):
        load_callable(f"{path}:mak")
    with pytest.raises(UsageError, match="holds a int, not a callable, as `NUMBER`"):
        load_callable(f"{path}:NUMBER")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1\n1 / 0", r"ZeroDivisionError: division by zero \(my.py, line 2\)"),
        ("def (", r"SyntaxError: invalid syntax \(my.py, line 1\)"),
        ("raise SystemExit('bye')", r"SystemExit: bye \(my.py, line 1\)"),
        ("raise ValueError", r"ValueError: no reason given \(my.py, line 1\)"),
        ("import no_such_module_anywhere", r"(?s)ModuleNotFoundError: .*hint: pip install no_such_module_anywhere"),
    ],
)
def test_a_file_that_fails_is_told_where_and_is_forgotten(tmp_path: Path, text: str, says: str) -> None:
    before = set(sys.modules)
    with pytest.raises(RyzenError, match=says):
        load_callable(f"{write(tmp_path, text)}:make")
    assert not [name for name in set(sys.modules) - before if name.startswith("ryzen_script")]


def test_a_function_that_fails_is_told_where() -> None:
    with pytest.raises(RyzenError, match=r"`it` failed: KeyError: 'a' \(test_script.py, line"):
        call_user_function("it", lambda: {}["a"])


def test_a_refusal_passes_through() -> None:
    def refuse() -> None:
        raise UsageError("no")

    with pytest.raises(UsageError, match="^no$"):
        call_user_function("it", refuse)
