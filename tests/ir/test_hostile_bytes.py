"""Damaged bytes: a file that was changed anywhere is read or refused, and nothing else happens."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import onnx_samples

from ryzen_compile.errors import ModelError
from ryzen_compile.ir.fingerprint import file_digest_hex, fingerprint
from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.ir.load import load
from ryzen_compile.ir.save import save

_SOUND = [
    onnx_samples.model(text).SerializeToString()
    for text in (onnx_samples.BRANCHES, onnx_samples.IR_VERSION_3, onnx_samples.STRINGS_AND_SEQUENCES)
]


def _with_external() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return onnx_samples.write_external(Path(folder, "m.onnx")).read_bytes()


_EDIT = st.tuples(
    st.floats(0, 1, exclude_max=True),
    st.sampled_from(["replace"] * 8 + ["delete", "insert", "cut"]),
    st.binary(min_size=1, max_size=3),
)


def _damage(content: bytes, edits: list[tuple[float, str, bytes]]) -> bytes:
    for where, kind, new in edits:
        at = int(where * len(content))
        skipped = {"replace": len(new), "delete": len(new), "insert": 0, "cut": len(content)}[kind]
        content = content[:at] + (new if kind in ("replace", "insert") else b"") + content[at + skipped :]
    return content


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("damaged")
    onnx_samples.write_external(path / "m.onnx")
    return path


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(sound=st.sampled_from([*_SOUND, _with_external()]), edits=st.lists(_EDIT, min_size=1, max_size=2))
def test_a_damaged_file_is_read_or_refused(folder: Path, sound: bytes, edits: list[tuple[float, str, bytes]]) -> None:
    path = folder / "m.onnx"
    path.write_bytes(_damage(sound, edits))
    says = ""
    try:
        model = load(path)
        file_digest_hex(path)
        known = fingerprint(model)
        interface_of(model)
        save(model, folder / "again.onnx")
    except ModelError as error:
        says = error.message
    else:
        assert fingerprint(load(folder / "again.onnx")) == known
    assert "\n" not in says
