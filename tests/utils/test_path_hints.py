"""Tests of hints for paths that are not what was expected."""

from __future__ import annotations

from pathlib import Path

import pytest

from ryzen_compile.utils.path_hints import folder_content_hint, is_hugging_face_folder, missing_path_hint, similar_path


def write(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(
    ("wanted", "found"), [("encoder.onx", "encoder.onnx"), ("encodr.onnx", "encoder.onnx"), ("other.npz", None)]
)
def test_a_path_with_a_similar_name_is_found(wanted: str, found: str | None, tmp_path: Path) -> None:
    folder = write(tmp_path / "models", "encoder.onnx", "a.py")
    assert similar_path(folder / wanted) == (None if found is None else str(folder / found))
    expected = "otherwise" if found is None else f"did you mean `{folder / found}`?"
    assert missing_path_hint(folder / wanted, "otherwise") == expected


def test_a_path_in_a_folder_that_does_not_exist_has_no_similar_one(tmp_path: Path) -> None:
    assert similar_path(tmp_path / "absent" / "m.onnx") is None


def test_unprintable_names_are_escaped(tmp_path: Path) -> None:
    folder = write(tmp_path / "models", "encoder\n.onnx")
    assert "encoder\\n.onnx" in missing_path_hint(folder / "encoder.onnx", "otherwise")


def test_the_content_of_a_folder_decides_how_it_is_used(tmp_path: Path) -> None:
    hugging_face = write(tmp_path / "bert", "config.json", "model.safetensors")
    assert folder_content_hint(hugging_face, "otherwise").endswith(f"ryzen-compile export hf:{hugging_face} first")
    graphs = write(tmp_path / "graphs", "step-1.onnx")
    assert folder_content_hint(graphs, "otherwise").endswith(f"ryzen-compile build {graphs}")
    assert folder_content_hint(write(tmp_path / "empty"), "otherwise") == "otherwise"
    assert is_hugging_face_folder(write(tmp_path / "gguf", "model.gguf"))
    assert not is_hugging_face_folder(write(tmp_path / "config", "config.json"))
    assert not is_hugging_face_folder(tmp_path / "absent")
