"""User scripts: loading and calling a function of a Python file, specified as `file.py:name`."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ryzen_compile.errors import RyzenError, UsageError, did_you_mean, printable
from ryzen_compile.utils.path_hints import missing_path_hint


def is_script_reference(text: str) -> bool:
    """Return whether `text` has the form `file.py` or `file.py:name`."""
    return split_script_reference(text)[0].endswith(".py")


def split_script_reference(text: str) -> tuple[str, str | None]:
    """Split `file.py:name` into the file and the name, or None if there is no name. A drive's colon is part of the file."""
    file, colon, name = text.rpartition(":")
    return (file, name) if colon and file and name.isidentifier() else (text, None)


def load_callable(text: str, *, default: str | None = None) -> Callable[..., Any]:
    """Execute a Python file and return the callable specified as `file.py:name`; the name defaults to `default`.

    The file's folder is appended to the import path. Raises UsageError if no name is given or the name is not a callable,
    RyzenError if the file is missing, or, with the reason and the source line, if it fails.
    """
    file, name = split_script_reference(text)
    name = name or default
    path = Path(file)
    if name is None:
        functions = ", ".join(f"{file}:{function}" for function in _function_names(path))
        example = f"use {functions}" if functions else f"use {file}:NAME, with a function of that file"
        raise UsageError(f"`{text}` names no callable", hint=example)
    if not path.is_file():
        hint = missing_path_hint(path, "give the path of an existing file: FILE.py:NAME")
        raise RyzenError(f"there is no file `{file}`", hint=hint)
    module_name = f"ryzen_script_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"`{file}` is not a Python file", hint="its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        sys.modules.pop(module_name, None)
        raise RyzenError(f"`{file}` cannot be imported: {describe_error(error)}", hint=_install_hint(error)) from error
    function = getattr(module, name, None)
    if not callable(function):
        callables = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        problem = "has no" if function is None else f"holds a {type(function).__name__}, not a callable, as"
        raise UsageError(f"`{file}` {problem} `{name}`", hint=did_you_mean(name, callables))
    return function  # type: ignore[no-any-return]


def _function_names(path: Path) -> list[str]:
    """Return the public functions of a Python file that take no argument, at most 5, without executing it."""
    try:
        statements = ast.parse(path.read_bytes()).body
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    functions = [node for node in statements if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    return [node.name for node in functions if not (node.args.args or node.args.posonlyargs)][:5]


def call_user_function(name: str, function: Callable[..., Any]) -> Any:
    """Call a script's function without arguments. Raises RyzenError with the reason and the source line if it fails."""
    try:
        return function()
    except (RyzenError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise RyzenError(f"`{name}` failed: {describe_error(error)}", hint=_install_hint(error)) from error


def _install_hint(error: BaseException) -> str | None:
    return f"pip install {error.name}" if isinstance(error, ModuleNotFoundError) else None


def describe_error(error: BaseException, *, exclude_dir: str | None = None) -> str:
    """Return the error's type and message on one line, and its innermost source line outside of `exclude_dir`."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {printable(error.msg)} ({Path(error.filename or '?').name}, line {error.lineno})"
    return f"{error_text(error)}{error_location(error, exclude_dir=exclude_dir)}"


def error_text(error: BaseException) -> str:
    """Return the error's type and message on one line."""
    try:
        message = printable(" ".join(str(error).split())) or "no reason given"
    except Exception:  # noqa: BLE001 - the `__str__` of a script's own exception
        message = "its message cannot be printed"
    return f"{type(error).__name__}: {message}"


def error_location(error: BaseException, *, exclude_dir: str | None = None) -> str:
    """Return the innermost source line outside of this module and `exclude_dir` as ` (my.py, line 3)`, or an empty string."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__
        and "importlib" not in frame.filename
        and (exclude_dir is None or not frame.filename.startswith(exclude_dir))
    ]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
