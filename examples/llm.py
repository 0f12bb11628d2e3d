"""A language model: exported with KV caches of fixed size, built as one package for prompts and steps, and run.

    python examples/llm.py    # writes decode/ and decode.ryzen to the current folder

`tinylm` is a recipe with trained weights; `hf:FOLDER` in its place takes a Hugging Face folder, whose engine takes text.
"""

from __future__ import annotations

import ryzen_compile as rc

rc.export_steps("tinylm", "decode")
with rc.load(rc.build("decode", gpu="cpu")) as engine:
    (sequence,) = engine.generate([list(b"the first ")], max_new_tokens=16)
    print(bytes(sequence.tokens.tolist()))
