"""tinylm: answers require the context, and the evaluation data is consistent."""

from __future__ import annotations

import numpy as np
import pytest

from ryzen_models.tinylm import documents, questions
from ryzen_models.tinylm.model import WEIGHTS, load_trained

COUNT = 40


def answer_rate(task: str, window: int | None) -> float:
    """Return the fraction of COUNT questions answered correctly if queries attend to the last `window` tokens (None: all)."""
    import torch

    model = load_trained()
    batch = [getattr(questions, task)(seed) for seed in range(COUNT)]
    ids = torch.from_numpy(np.stack([np.concatenate([question.prompt, question.answer]) for question in batch]))
    seq, answer = ids.shape[1], len(batch[0].answer)
    mask = torch.ones(seq, seq, dtype=torch.bool).tril()
    if window is not None:
        mask &= ~torch.ones(seq, seq, dtype=torch.bool).tril(-window)
    with torch.no_grad():
        logits = torch.cat([model(chunk, attention_mask=mask.expand(len(chunk), 1, seq, seq)).logits for chunk in ids.split(8)])
    return float((logits[:, -answer - 1 : -1].argmax(-1) == ids[:, -answer:]).all(-1).float().mean())


@pytest.mark.parametrize(("task", "minimum"), [("needle", 0.95), ("recall", 0.95), ("copy", 0.9)])
def test_tinylm_answers_with_its_full_context(task: str, minimum: float) -> None:
    assert answer_rate(task, None) >= minimum


def test_tinylm_cannot_answer_if_the_window_excludes_the_fact() -> None:
    window = 64
    batch = [questions.needle(seed) for seed in range(COUNT)]
    within = np.mean([question.distance + documents.FACT_BYTES < window for question in batch])
    assert answer_rate("needle", window) <= within + 0.02


def test_questions_contain_their_answer_once_at_the_stated_position() -> None:
    for task in (questions.needle, questions.recall):
        for seed in range(20):
            question = task(seed)
            text = bytes(question.prompt.astype(np.uint8))
            key, word = text[-documents.KEY - 1 : -1], bytes(question.answer.astype(np.uint8))
            assert len(text) + len(word) == questions.CONTEXT_BYTES
            assert text.endswith(b"{" + key + b"?")
            position = text.index(b"{" + key + b"=" + word + b"}")
            assert question.distance == len(text) - position - documents.FACT_BYTES
            assert question.depth == position / len(text)
            assert text.count(b"=") == (1 if task is questions.needle else questions.FACT_COUNT)


def test_the_weights_are_half_precision_and_small() -> None:
    from safetensors import safe_open

    assert WEIGHTS.stat().st_size < 10_000_000
    with safe_open(WEIGHTS, "numpy") as file:
        assert {file.get_slice(name).get_dtype() for name in list(file.keys())} == {"F16"}


def test_calibration_and_evaluation_text_are_disjoint() -> None:
    text = questions.HELD_OUT_TEXT.read_bytes()
    assert bytes(questions.prose(0)) + bytes(questions.prose(1)) == text
