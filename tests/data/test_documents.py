"""Tests of documents from a text file: it is read in blocks, as far as documents are requested."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ryzen_compile.data import documents
from ryzen_compile.data.documents import documents_from_samples
from ryzen_compile.errors import RyzenError
from ryzen_compile.spec.interface import InputSpec
from ryzen_compile.text.tokenizer import TextTokenizer

IDS = InputSpec(name="ids", dtype="int64", dims=("batch", "seq"), role="ids")
START = 7


@pytest.fixture
def tokenizer() -> TextTokenizer:
    """Return a tokenizer of digits that begins each text with START."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {**{str(digit): digit for digit in range(7)}, "<s>": START}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", START)])
    return TextTokenizer({"tokenizer.json": tokenizer.to_str().encode()}, source="it")


def read(path: Path, tokenizer: TextTokenizer) -> Iterator[list[int]]:
    return (ids.tolist() for ids in documents_from_samples(str(path), IDS, lambda: tokenizer)(0))


def test_a_text_of_one_block_is_cut_into_documents_of_the_same_size(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = tmp_path / "text.txt"
    words = np.random.default_rng(0).integers(0, 7, 5000).tolist()
    path.write_text(" ".join(map(str, words)))
    found = list(read(path, tokenizer))
    assert [len(ids) for ids in found] == [2048, 2048, 905]
    assert list(itertools.chain(*found)) == [START, *words]
    path.write_text(" ".join(map(str, words[:2048])))
    assert [len(ids) for ids in read(path, tokenizer)] == [2048], "the last document would be a single token"
    path.write_text("")
    assert list(read(path, tokenizer)) == []


def test_a_large_text_is_read_in_blocks_of_lines(
    tmp_path: Path, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "TEXT_BLOCK_CHARACTERS", 10)
    path = tmp_path / "text.txt"
    path.write_bytes(b"1 2 3 4 5 6\n" + b"0 1 2 3\n" * 10_000 + b"\xff")
    assert next(read(path, tokenizer)) == [START, 1, 2, 3, 4, 5, 6], "the rest, which is not UTF-8, is not read"
    path.write_text("1 2 3 4 5 6\n0 1 2 3\n" + "4 " * 15)
    assert list(read(path, tokenizer)) == [[START, 1, 2, 3, 4, 5, 6], [START, 0, 1, 2, 3, *[4] * 6], [START, *[4] * 9]]


def test_a_text_that_cannot_be_read_is_refused(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    with pytest.raises(RyzenError, match=r"missing\.txt` cannot be read: No such file"):
        list(read(tmp_path / "missing.txt", tokenizer))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(RyzenError, match=r"latin\.txt` cannot be read: it is not UTF-8"):
        list(read(tmp_path / "latin.txt", tokenizer))
