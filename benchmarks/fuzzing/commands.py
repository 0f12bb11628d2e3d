"""Command lines of random commands, options and values.

Paths stay in the folder of the case. Commands that only measure this machine, or run for minutes, are left out.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import click

from fuzzing.runner import FuzzCase
from fuzzing.sources import packages

_LEFT_OUT = frozenset({"export", "evaluate", "calibrate", "doctor", "ops", "generate"})
_PATHS = (
    "linear.onnx",
    "linear.ryzen",
    "linear.tar",
    "decoder.onnx",
    "decoder.ryzen",
    "data.npz",
    "data.py",
    "notes.txt",
    "folder",
    "nothing",
    ".",
    "",
)
_WORDS = (
    "0",
    "1",
    "-1",
    "nan",
    "inf",
    "1e400",
    "99999999999999999999",
    "0.5",
    "x",
    "é",
    "\x1b[2J",
    "a\nb",
    "'",
    "--",
    "-",
    "cpu",
    "cpu,sm89",
    "sm89@windows",
    "sm0",
    "h200",
    "auto",
    ",",
    "cpu,,cpu",
    "fold",
    "none",
    "fold,fold",
    "fold{}",
    "fold{x=1}",
    "attention{to=onnx}",
    "kv-static{capacity=8}",
    "kv-static{capacity=",
    "precision{to=fp8}",
    "a{b{c}",
    "x:1x64",
    "x:0x64",
    "x:1x-1",
    "x:",
    ":1",
    "x:1x64,x:2x64",
    "x=1",
    "recipe:minilm",
    "recipe:nothing",
    "data.py:load_data",
    "data.py:nothing",
    "linear.ryzen#model",
    "linear.ryzen#model@fold",
    "linear.ryzen@nothing",
    "one=linear.onnx",
    "one=linear.onnx,two=decoder.onnx",
    "cosine=0.9",
    "max_abs<=1",
    "1,any",
    "%",
    "{}",
    "x" * 5000,
)
_PATH_OPTIONS = ("output", "save", "folder", "file", "data", "baseline", "statistics")


def make_case(rng: random.Random) -> FuzzCase:
    """Return a random command line in a folder with a model, a package, a tar, a data file and a script."""
    arguments = _command_line(rng)

    def make_files(folder: Path) -> None:
        for name in ("linear", "decoder"):
            shutil.copytree(packages() / f"{name}.ryzen", folder / f"{name}.ryzen")
            shutil.copy(packages() / f"{name}.onnx", folder / f"{name}.onnx")
        shutil.copy(packages() / "linear.tar", folder / "linear.tar")
        (folder / "data.py").write_text("import numpy as np\ndef load_data(): yield {'x': np.zeros((4, 64), np.float32)}\n")
        (folder / "data.npz").write_bytes(b"PK\x05\x06" + bytes(18))
        (folder / "notes.txt").write_text("notes")
        (folder / "folder").mkdir()

    return FuzzCase(
        arguments=arguments, outputs=tuple(_outputs(arguments)), note=" ".join(arguments)[:200], make_files=make_files
    )


def _command_line(rng: random.Random) -> tuple[str, ...]:
    from ryzen_compile.cli.main import program

    context = click.Context(program)
    names = [name for name in program.list_commands(context) if name not in _LEFT_OUT]
    name = rng.choice(names)
    if rng.random() < 0.03:
        return (rng.choice(_WORDS), name)
    command = program.get_command(context, name)
    words = [name]
    while isinstance(command, click.Group):
        words += _options(command, rng, few=True)
        name = rng.choice(command.list_commands(context))
        words.append(name)
        command = command.get_command(context, name)
    assert command is not None
    positional = [parameter for parameter in command.params if isinstance(parameter, click.Argument)]
    values = [rng.choice(_PATHS if rng.random() < 0.8 else _WORDS) for _ in positional]
    if rng.random() < 0.1:
        values = values[:-1] if rng.random() < 0.5 else [*values, rng.choice(_WORDS)]
    words += values + _options(command, rng)
    if words[0] in ("build", "rewrite") and rng.random() < 0.8:
        words += ["--no-cache"] if words[0] == "build" else []
    if words[0] == "bench":
        words += ["--duration", "0.05"]
    if words[0] == "build":
        words += ["--time-limit", "20"]
    return tuple(words)


def _options(command: click.Command, rng: random.Random, *, few: bool = False) -> list[str]:
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option) and parameter.name != "help"]
    words: list[str] = []
    for option in rng.sample(options, min(len(options), rng.choice((0, 0, 1) if few else (0, 1, 1, 2, 3)))):
        words.append(rng.choice(option.opts))
        if option.is_flag or rng.random() < 0.03:
            continue
        is_path = any(part in str(option.name) for part in _PATH_OPTIONS)
        words.append(rng.choice(_PATHS[:-1]) if is_path and rng.random() < 0.8 else rng.choice(_WORDS))
    if rng.random() < 0.05:
        words.append(rng.choice(("--no-such-option", "-z", "--json", "-q", "-v", "--help", "--gp")))
    return words


def _outputs(arguments: tuple[str, ...]) -> list[str]:
    """Return what a command line may create: its words as paths, and the packages that it may write."""
    words = {part for word in arguments for part in word.split("=") if part and len(part) < 200 and "\n" not in part}
    words |= {word for word in arguments if word and len(word) < 200}
    return sorted(words) + [
        "linear",
        *(f"v{version}" for version in range(10)),  # the folders of a cache
        "linear.ryzen",
        "decoder.ryzen",
        "linear.rejected.ryzen",
        "decoder.rejected.ryzen",
        "o.ryzen",
        "__pycache__",
        "one.ryzen",
        "one.rejected.ryzen",
        "folder.ryzen",
    ]
