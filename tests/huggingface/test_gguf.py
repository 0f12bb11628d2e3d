"""Tests of `hf:FILE.gguf`: weights, tokenizer and configuration of a GGUF file. They need the extra `gguf`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from tokenizers import Tokenizer

from ryzen_compile import registry
from ryzen_compile.errors import ModelError
from ryzen_compile.exporter import export
from ryzen_compile.ir.load import load
from ryzen_compile.ir.text_files import read_text_files
from ryzen_compile.text.sample_texts import TEXTS
from ryzen_compile.text.tokenizer import TextTokenizer

pytest.importorskip("gguf")
pytest.importorskip("accelerate")


def test_file_is_exported_with_dequantized_weights_and_its_tokenizer(tmp_path: Path) -> None:
    from support import tiny_gguf

    reference = tiny_gguf.write(tmp_path / "tiny.gguf")
    state = registry.find_recipe(f"hf:{tmp_path / 'tiny.gguf'}").make_module().state_dict()
    assert all(torch.equal(state[f"model.{name}"], tensor) for name, tensor in reference.state_dict().items())
    report = export(f"hf:{tmp_path}", tmp_path / "m.onnx")
    assert (report.name, report.cases) == ("tiny", 7)

    tokenizer = TextTokenizer(read_text_files(load(tmp_path / "m.onnx"), tmp_path / "m.onnx"), source="it")
    expected = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    for text in TEXTS:
        assert tokenizer.encode(text).tolist() == expected.encode(text, add_special_tokens=False).ids
    assert tokenizer.stop_ids == {2}
    assert tokenizer.encode_chat([{"role": "user", "content": "Yes."}])[0] == 1

    ids = tokenizer.encode(TEXTS[0])[None, :16]
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(16)[None]}
    caches = {
        f"past_key_values.{layer}.{role}": np.zeros((1, 2, 0, 16), np.float32) for layer in (0, 1) for role in ("key", "value")
    }
    (logits,) = session.run(["logits"], inputs | caches)
    with torch.inference_mode():
        np.testing.assert_allclose(logits, reference(torch.from_numpy(ids)).logits.numpy(), atol=1e-4)


def test_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUX" + bytes(100))
    with pytest.raises(ModelError, match="the configuration of `m` cannot be read: .*not a GGUF file"):
        registry.find_recipe(f"hf:{tmp_path}")
