"""What the code uses of TensorRT exists in NVIDIA's real bindings, also where their libraries are not.

The bindings of TensorRT load once three libraries are there; stubs of their nine C entry points are enough to ask what
classes and attributes they have.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ryzen_compile import backends
from ryzen_compile.backends.builder_options import OPTIONS

SUPPORT = Path(__file__).parents[1] / "support"
FILES = (
    "nvinfer/builder",
    "nvinfer/build_errors",
    "nvinfer/builder_log",
    "nvinfer/session",
    "tensorrt/backend",
    "tensorrt_rtx/backend",
)
CLASSES = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "error": "ParserError",
    "its": "IOptimizationProfile",
    "layer": "ILayer",
    "tensor": "ITensor",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "inspector": "EngineInspector",
    "timing_cache": "ITimingCache",
    "runtime_config": "IRuntimeConfig",
    "runtime_cache": "IRuntimeCache",
}
"""The names that the code has for TensorRT's objects -> their classes."""
NOT_TENSORRTS = {"error": {"filename", "strerror", "says", "hint"}, "tensor": {"array", "pointer"}, "layer": set()}


def ask(module: str, libraries: Path | None = None) -> dict[str, Any]:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries or "")}
    command = [sys.executable, str(SUPPORT / "inspect_nvidia_bindings.py"), module]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(answer.stdout)
    return found


@pytest.fixture(scope="module")
def tensorrt(nvidia_stubs: Path) -> dict[str, Any]:
    return ask("tensorrt_bindings", nvidia_stubs)


@pytest.fixture(scope="module")
def rtx() -> dict[str, Any]:
    return ask("tensorrt_rtx_bindings")


def used(files: tuple[str, ...]) -> set[tuple[str, str]]:
    """Return what the files use of TensorRT, as (class or `module`, attribute)."""
    found = set()
    for file in files:
        tree = ast.parse(Path(str(backends.__path__[0]), f"{file}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                owner = _name(node.value)
                if owner == "trt":
                    found.add(("module", node.attr))
                elif owner in CLASSES and node.attr not in NOT_TENSORRTS.get(owner, set()):
                    found.add((CLASSES[owner], node.attr))
                elif isinstance(node.value, ast.Attribute) and _name(node.value.value) == "trt":
                    found.add((node.value.attr, node.attr))
    return found


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    return node.attr.lstrip("_") if isinstance(node, ast.Attribute) else ""


def missing(files: tuple[str, ...], offered: dict[str, Any]) -> set[tuple[str, str]]:
    return {
        (owner, name)
        for owner, name in used(files)
        if name not in (offered["module"] if owner == "module" else offered["classes"].get(owner, ()))
    }


def test_all_that_is_used_of_rtx_exists(rtx: dict[str, Any]) -> None:
    files = tuple(file for file in FILES if file != "tensorrt/backend")
    assert missing(files, rtx) == set()


def test_all_that_is_used_of_tensorrt_exists(tensorrt: dict[str, Any]) -> None:
    files = tuple(file for file in FILES if file != "tensorrt_rtx/backend")
    assert missing(files, tensorrt) == set()


def test_what_only_rtx_has_is_only_used_there(tensorrt: dict[str, Any]) -> None:
    assert missing(("tensorrt_rtx/backend",), tensorrt) >= {
        ("IBuilderConfig", "num_compute_capabilities"),
        ("module", "ComputeCapability"),
    }


def test_the_check_sees_what_is_used() -> None:
    assert {
        ("Builder", "build_serialized_network"),
        ("module", "OnnxParser"),
        ("IExecutionContext", "execute_async_v3"),
    } <= used(FILES)
    assert {("IBuilderConfig", "set_timing_cache"), ("module", "init_libnvinfer_plugins")} <= used(("tensorrt/backend",))
    assert len(used(FILES)) > 50


def test_every_option_can_be_set_on_tensorrt(tensorrt: dict[str, Any]) -> None:
    assert tensorrt["failed"] == {}


def test_every_option_that_rtx_takes_can_be_set_on_it(rtx: dict[str, Any]) -> None:
    taken = {option.name for option in OPTIONS if "tensorrt-rtx" not in option.unsupported_backends}
    assert not taken & set(rtx["failed"])


def test_bindings_without_libraries_are_absent_with_the_reason_and_the_command() -> None:
    from ryzen_compile.backends.tensorrt.backend import BACKEND

    found = BACKEND.probe()
    assert not found.available
    assert found.message.startswith("there is no TensorRT here: its libraries cannot be loaded: libnv")
    assert found.install_hint == "pip install 'ryzen-compile[tensorrt]'"
    assert len(found.not_executed) >= 5
