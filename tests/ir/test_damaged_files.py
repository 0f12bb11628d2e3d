"""Fuzz test of loading: a damaged file is either loaded or refused with a one-line ModelError."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import onnx_samples
from support.examples import examples

from ryzen_compile.errors import ModelError
from ryzen_compile.ir.fingerprint import file_digest_hex, fingerprint
from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.ir.load import load
from ryzen_compile.ir.save import save

_VALID_MODELS = [
    onnx_samples.model(text).SerializeToString()
    for text in (onnx_samples.BRANCHES, onnx_samples.IR_VERSION_3, onnx_samples.STRINGS_AND_SEQUENCES)
]


def _valid_model_with_external_data() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return onnx_samples.write_external(Path(folder, "m.onnx")).read_bytes()


_EDIT = st.tuples(
    st.floats(0, 1, exclude_max=True),
    st.sampled_from(["replace"] * 8 + ["delete", "insert", "cut"]),
    st.binary(min_size=1, max_size=3),
)


def _damage(content: bytes, edits: list[tuple[float, str, bytes]]) -> bytes:
    for position, edit_type, data in edits:
        offset = int(position * len(content))
        skipped = {"replace": len(data), "delete": len(data), "insert": 0, "cut": len(content)}[edit_type]
        content = content[:offset] + (data if edit_type in ("replace", "insert") else b"") + content[offset + skipped :]
    return content


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("damaged")
    onnx_samples.write_external(path / "m.onnx")
    return path


@settings(max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    content=st.sampled_from([*_VALID_MODELS, _valid_model_with_external_data()]), edits=st.lists(_EDIT, min_size=1, max_size=2)
)
def test_damaged_file_is_loaded_or_refused(folder: Path, content: bytes, edits: list[tuple[float, str, bytes]]) -> None:
    path = folder / "m.onnx"
    path.write_bytes(_damage(content, edits))
    message = ""
    try:
        model = load(path)
        file_digest_hex(path)
        expected = fingerprint(model)
        interface_of(model)
        save(model, folder / "again.onnx")
    except ModelError as error:
        message = error.message
    else:
        assert fingerprint(load(folder / "again.onnx")) == expected
    assert "\n" not in message
