"""Documents of token ids, read from samples on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ryzen_compile.data.loading import load_samples
from ryzen_compile.errors import RyzenError, UsageError, printable
from ryzen_compile.spec.interface import InputSpec, Interface

if TYPE_CHECKING:
    from ryzen_compile.text.tokenizer import TextTokenizer

    Array = np.ndarray[Any, Any]


TEXT_DOCUMENT_TOKENS = 2048
"""The number of tokens of a document that is cut from a text file; the last one of a block may be shorter."""
TEXT_BLOCK_CHARACTERS = 1 << 20
"""The size of the blocks of lines in which a text file is read and encoded; only as many as documents are used."""


def documents_from_samples(
    data: str, ids_spec: InputSpec, find_tokenizer: Callable[[], TextTokenizer | None] = lambda: None
) -> Callable[[int], Iterable[Array]]:
    """Return a function from a seed to the documents in `data`, token ids of shape (tokens,) each.

    `data` is a text file, `FILE.txt`, which the tokenizer of the model encodes, or a reference as for `--data`, to ids of shape
    (documents, tokens) by the name of the input `ids_spec`. Every seed yields all documents. Raises UsageError if `data` refers
    to no samples, or is a text and `find_tokenizer` returns None.
    """
    if Path(data).suffix == ".txt":
        tokenizer = find_tokenizer()
        if tokenizer is None:
            raise UsageError(
                f"`{printable(Path(data))}` is a text, and the model has no tokenizer",
                hint="give token ids, FILE.npz, or export the model from its Hugging Face folder: hf:FOLDER",
            )
        return lambda seed: _text_documents(Path(data), tokenizer)
    spec = InputSpec(
        name=ids_spec.name, dtype=ids_spec.dtype, dims=("documents", "tokens"), role="ids", low=ids_spec.low, high=ids_spec.high
    )
    samples = load_samples(data, Interface(inputs=(spec,), outputs=()), seed=0)

    def make_documents(seed: int) -> Iterator[Array]:
        for sample in samples:
            yield from sample[ids_spec.name]

    return make_documents


def _text_documents(path: Path, tokenizer: TextTokenizer) -> Iterator[Array]:
    """Yield the documents of a text file, each of at least 2 tokens. Raises RyzenError if the file cannot be read."""
    for block in _text_blocks(path):
        ids = tokenizer.encode(block)
        for start in range(0, len(ids) - 1, TEXT_DOCUMENT_TOKENS):
            yield ids[start : start + TEXT_DOCUMENT_TOKENS]


def _text_blocks(path: Path) -> Iterator[str]:
    """Yield a text file in blocks that end with a line, unless a line is as large as a block."""
    try:
        with path.open(encoding="utf-8") as file:
            while block := file.read(TEXT_BLOCK_CHARACTERS):
                yield block + file.readline(TEXT_BLOCK_CHARACTERS)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise RyzenError(f"`{printable(path)}` cannot be read: {reason}", hint="give a text file in UTF-8") from error
