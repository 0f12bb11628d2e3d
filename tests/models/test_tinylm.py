"""tinylm: it answers from its context, and cannot without."""

from __future__ import annotations

import numpy as np
import pytest

from ryzen_models.tinylm import documents, questions
from ryzen_models.tinylm.model import WEIGHTS, load_trained

COUNT = 40


def answered(task: str, window: int | None) -> float:
    """Return the share of COUNT questions answered by a model whose queries see `window` tokens, or all."""
    import torch

    model = load_trained()
    asked = [getattr(questions, task)(seed) for seed in range(COUNT)]
    ids = torch.from_numpy(np.stack([np.concatenate([one.prompt, one.answer]) for one in asked]))
    seq, answer = ids.shape[1], len(asked[0].answer)
    seen = torch.ones(seq, seq, dtype=torch.bool).tril()
    if window is not None:
        seen &= ~torch.ones(seq, seq, dtype=torch.bool).tril(-window)
    with torch.no_grad():
        logits = torch.cat([model(part, attention_mask=seen.expand(len(part), 1, seq, seq)).logits for part in ids.split(8)])
    return float((logits[:, -answer - 1 : -1].argmax(-1) == ids[:, -answer:]).all(-1).float().mean())


@pytest.mark.parametrize(("task", "least"), [("needle", 0.95), ("recall", 0.95), ("copy", 0.9)])
def test_it_answers_with_all_of_its_context(task: str, least: float) -> None:
    assert answered(task, None) >= least


def test_it_cannot_answer_with_a_window_that_drops_the_needle() -> None:
    window = 64
    asked = [questions.needle(seed) for seed in range(COUNT)]
    within = np.mean([one.distance + documents.FACT_BYTES < window for one in asked])
    assert answered("needle", window) <= within + 0.02


def test_questions_hold_their_answer_once_where_they_say() -> None:
    for task in (questions.needle, questions.recall):
        for seed in range(20):
            one = task(seed)
            text = bytes(one.prompt.astype(np.uint8))
            key, word = text[-documents.KEY - 1 : -1], bytes(one.answer.astype(np.uint8))
            assert len(text) + len(word) == questions.CONTEXT_BYTES
            assert text.endswith(b"{" + key + b"?")
            at = text.index(b"{" + key + b"=" + word + b"}")
            assert one.distance == len(text) - at - documents.FACT_BYTES
            assert one.depth == at / len(text)
            assert text.count(b"=") == (1 if task is questions.needle else questions.FACT_COUNT)


def test_the_weights_are_half_precision_and_small() -> None:
    from safetensors import safe_open

    assert WEIGHTS.stat().st_size < 10_000_000
    with safe_open(WEIGHTS, "numpy") as file:
        assert {file.get_slice(name).get_dtype() for name in list(file.keys())} == {"F16"}


def test_what_it_is_calibrated_on_is_not_what_it_is_evaluated_on() -> None:
    whole = questions.HELD_OUT_TEXT.read_bytes()
    assert bytes(questions.prose(0)) + bytes(questions.prose(1)) == whole
