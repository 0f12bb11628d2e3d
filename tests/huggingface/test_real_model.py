"""Test of a real language model, from its folder to text: skipped unless RYZEN_HF_FOLDER names a Hugging Face folder.

RYZEN_HF_FOLDER=path/to/gemma-3-270m pytest tests/huggingface/test_real_model.py
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import ryzen_compile as rc

FOLDER = os.environ.get("RYZEN_HF_FOLDER")
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):",
    "Water boils at 100 degrees because",
    "The three most important ideas of the book are",
)
NEW_TOKENS = 256


@pytest.mark.slow
@pytest.mark.skipif(FOLDER is None, reason="RYZEN_HF_FOLDER names no Hugging Face folder of a language model")
def test_static_caches_continue_prompts_as_transformers_does(tmp_path: Path) -> None:
    rc.export_steps(f"hf:{FOLDER}", tmp_path / "dec")
    package = rc.build(tmp_path / "dec", gpu="cpu", compare=False, cache=False)
    with rc.load(package.path) as engine:
        sequences = [engine.generate(prompt, max_new_tokens=NEW_TOKENS, stop=())[0] for prompt in PROMPTS]
        ids = [engine.tokenizer.encode(prompt) for prompt in PROMPTS]
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    for prompt, prompt_ids, sequence in zip(PROMPTS, ids, sequences, strict=True):
        inputs = torch.from_numpy(prompt_ids)[None]
        output = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=NEW_TOKENS, do_sample=False)
        assert sequence.tokens.tolist() == output[0, inputs.shape[1] :].tolist(), prompt
