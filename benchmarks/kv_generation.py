"""Long continuations of a real language model with KV methods, against its full caches.

    python benchmarks/kv_generation.py FOLDER WORK [--cases REGEX] [--prompt 1024] [--new-tokens 512] [--save FILE]

FOLDER, WORK, the texts and the cases are those of `kv_methods.py`. The first `--prompt` tokens of documents of each kind of
text are continued greedily by the full caches and by each case. The perplexity of a continuation is that under the full caches;
a greedy text that repeats itself has a low one, so the share of repeated n-grams is measured too. Each case is kept in
WORK/NAME.generation.json, so that an interrupted run continues.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from kv_methods import FULL, add_arguments, make_pipelines, open_case, prepare_model, read_documents, read_head, read_tokenizer
from process import argument_parser, save

from ryzen_compile.artifacts.package.manifest import MetricResult
from ryzen_compile.evaluation.generation import measure_generation
from ryzen_compile.evaluation.systems import Systems
from ryzen_compile.evaluation.token_decoders import SessionDecoder
from ryzen_compile.runtime.generation.sampling import SamplingParams

Array = np.ndarray[Any, Any]


class DecoderWithHead:
    """A decoder of hidden states, and the weights that map them to logits."""

    is_chunk_invariant = True
    """The continuations are scored in blocks: the full caches compute the same logits in steps of any size."""

    def __init__(self, decoder: SessionDecoder, head: torch.Tensor) -> None:
        self.name, self._decoder, self._head = decoder.name, decoder, head
        self.reset = decoder.reset

    def step(self, ids: Array) -> Array:
        """Feed `ids` (rows, tokens) and return the logits, (rows, tokens, vocabulary)."""
        return np.asarray((torch.from_numpy(self._decoder.step(ids)) @ self._head).numpy())


def main() -> int:
    parser = argument_parser(__doc__, rounds=1)
    add_arguments(parser)
    parser.add_argument("--prompt", type=int, default=1024, help="the tokens of a prompt [%(default)s]")
    parser.add_argument("--new-tokens", type=int, default=512, help="the tokens of a continuation [%(default)s]")
    args = parser.parse_args()
    model, head, tokenizer = prepare_model(args), read_head(args.folder), read_tokenizer(Path(args.folder))
    prompts = [document[: args.prompt] for document in read_documents(args, tokenizer)[0]]
    pipelines = make_pipelines(args, model)
    results = {}
    for name, passes in pipelines.items():
        file = args.work / f"{name}.generation.json"
        if not file.exists():
            if name == FULL or not re.search(args.cases, name):
                continue
            with open_case(model, pipelines[FULL], args.rows) as (full, _), open_case(model, passes, args.rows) as (case, _):
                systems = Systems(
                    baseline=DecoderWithHead(full, head),
                    method=None,
                    candidate=DecoderWithHead(case, head),
                    batch_size=args.rows,
                )
                measured = measure_generation(
                    systems,
                    prompts,
                    new_tokens=args.new_tokens,
                    sampling=SamplingParams(temperature=0.0),
                    chunk_size=args.chunk,
                    seed=0,
                )
            file.write_bytes(msgspec.json.encode(measured))
            print(name, *map(describe, measured), sep="\n  ", flush=True)
        results[name] = msgspec.json.decode(file.read_bytes())
    configuration = {key: getattr(args, key) for key in ("context", "chunk", "documents", "prompt", "new_tokens")}
    save(args.save, {**configuration, "cases": results})
    return 0


def describe(result: MetricResult) -> str:
    """Return a metric on one line."""
    values = (result.candidate, result.baseline)
    texts = [f"{value.value:.4f} ({value.low:.4f} to {value.high:.4f})" for value in values if value is not None]
    return f"{result.name}: {', of the full caches '.join(texts)}"


if __name__ == "__main__":
    raise SystemExit(main())
