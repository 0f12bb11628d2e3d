"""Tests of hints: each names what resolves the problem for this request and this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import tiny_models

from ryzen_compile.cli.main import run

PROGRAM = str(Path(sys.executable).with_name("ryzen-compile"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hints")
    tiny_models.write(path / "small.onnx")
    (path / "net.py").write_text("import torch\n\ndef make():\n    return torch.nn.ReLU()\n")
    (path / "weights.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ")
    (path / "model.pt").write_bytes(b"PK\x03\x04")
    (path / "old.ryzen").mkdir()
    (path / "old.ryzen" / "manifest.json").write_text("{}")
    return path


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["build", "net.py"], "not an ONNX file", "ryzen-compile export net.py:FUNCTION model.onnx"),
        (["build", "model.pt"], "not an ONNX file", "load it in a function that returns (module, inputs)"),
        (["build", "weights.safetensors"], "not an ONNX file", "it holds weights without a graph"),
        (["build", "old.ryzen"], "is a package, not a model", "give the ONNX file that it was built from"),
        (["build", "minilm"], "cannot read", "ryzen-compile export minilm minilm.onnx"),
        (["build", "nowhere.onnx"], "cannot read", "give the path of an ONNX file"),
        (["export", "small.onnx"], "is an ONNX file, not a PyTorch module", "ryzen-compile build small.onnx --gpu cpu"),
        (["export", "net.py:make"], "without sample inputs", "return module, (torch.randn(1, 3, 224, 224),)"),
        (["compare", "small.onnx"], "Missing option '--baseline'", "FILE.py:FUNCTION, recipe:NAME or hf:FOLDER"),
        (["rewrite", "small.onnx"], "Missing argument 'OUTPUT'", "ryzen-compile rewrite [OPTIONS] MODEL OUTPUT"),
    ],
)
def test_the_hint_names_what_to_do(
    arguments: list[str],
    message: str,
    hint: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    assert run(arguments) in (1, 2)
    error, hint_line = capsys.readouterr().err.strip().splitlines()
    assert message in error
    assert hint in hint_line


def run_without(modules: list[str], arguments: list[str], folder: Path, tmp_path: Path) -> list[str]:
    """Run the program as if `modules` were not installed, and return the lines of its errors and hints."""
    for name in modules:
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('No module named {name}')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [PROGRAM, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    return [line for line in result.stderr.splitlines() if line.startswith(("error", "hint"))]


@pytest.mark.parametrize(
    ("gpu", "backend", "hint"),
    [
        ("cpu", "onnxruntime", "pip install 'ryzen-compile[cpu]'"),
        ("sm89", "tensorrt-rtx", "pip install 'ryzen-compile[rtx]'"),
        ("h200", "tensorrt", "run the same command on a machine with h200 and tensorrt installed, or leave h200 out"),
    ],
)
def test_a_target_without_its_backend_names_the_extra_or_the_machine(
    gpu: str, backend: str, hint: str, folder: Path, tmp_path: Path
) -> None:
    modules = ["onnxruntime", "tensorrt_rtx_bindings", "tensorrt", "tensorrt_bindings"]
    arguments = ["build", "small.onnx", "-o", str(tmp_path / "p.ryzen"), "--gpu", gpu, "--no-compare", "--no-cache"]
    error, hint_line = run_without(modules, arguments, folder, tmp_path)
    assert f"{gpu}: refused by {backend} for `model`: " in error
    assert hint in hint_line


def test_compare_without_pytorch_names_the_extra(folder: Path, tmp_path: Path) -> None:
    lines = run_without(["torch"], ["compare", "small.onnx", "--baseline", "net.py:make"], folder, tmp_path)
    assert lines == [
        "error: PyTorch cannot be imported: No module named torch [refused]",
        "hint: pip install 'ryzen-compile[torch]'",
    ]


@pytest.fixture
def mistaken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working folder, with a Hugging Face folder, a folder of graphs, a script and a graph."""
    (tmp_path / "bert").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / "bert" / name).touch()
    (tmp_path / "dec").mkdir()
    tiny_models.write(tmp_path / "dec" / "step-1.onnx")
    tiny_models.write(tmp_path / "net.onnx")
    (tmp_path / "net.py").write_text("def make(): ...\ndef _helper(): ...\ndef scaled(factor): ...\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["export", "bert"], "write hf:bert"),
        (["export", "hf:brt"], "did you mean `hf:bert`?"),
        (["export", "hf:bert/config.json"], "give its folder: hf:bert"),
        (["export", "hf:google/gemma-3"], "hf download google/gemma-3 --local-dir gemma-3, then give hf:gemma-3"),
        (["export", "net.py"], "use net.py:make"),
        (["export", "nett.py:make"], "did you mean `net.py`?"),
        (["export", "net.py:make", "dec"], "for step graphs of a decoder, end it with `/`: dec/"),
        (["export", "net.py:make", "--dynamic", "x:0=batch,1=time=4..9"], "write a range with a colon: time:4..9"),
        (["export", "net.py:make", "new/", "-p", "kv-static"], "write kv-static{capacity=...}"),
        (["export", "net.py:make", "new/", "-p", "fold"], "begin with kv-static{capacity=4096}"),
        (["build", "bert"], "for a package, ryzen-compile export hf:bert first"),
        (["build", "hf:bert"], "export it first: ryzen-compile export hf:bert model.onnx"),
        (["build", "net.py:make"], "export it first: ryzen-compile export net.py:make model.onnx"),
        (["build", "nett.onnx"], "did you mean `net.onnx`?"),
        (["compare", "net.onnx", "--baseline", "bert"], "hf:bert as a baseline"),
        (["generate", "dec", "a prompt"], "ryzen-compile build dec"),
        (["run", "net.onnx", "--data", "nets.npz"], "give an .npz file, or a folder of .npz files"),
    ],
)
def test_natural_mistakes_have_a_hint_that_leads_on(
    arguments: list[str], hint: str, mistaken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(mistaken.iterdir())
    assert run(arguments) in (1, 2)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("hint: "))
    assert hint in line
    assert sorted(mistaken.iterdir()) == before
