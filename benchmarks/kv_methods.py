"""Perplexity and retrieval of a real language model with each KV method, against the full caches.

    python benchmarks/kv_methods.py FOLDER WORK --save FILE [--cases REGEX]

FOLDER is a Hugging Face folder, such as that of `gemma_folder.py`. WORK keeps the exported model and the statistics of
calibrated scores. Each measured case is added to FILE at once, and cases that FILE has are not measured again, so that a run
can be interrupted, and continued with other cases. The case of the full caches is measured first.

The caches hold `--context` tokens; every document has as many, which are fed in steps of `--chunk`. The perplexity counts the
tokens in the second half of each document, where every budget up to a half of the context evicts. A case is compared with the
full caches document by document; its interval is bootstrapped over documents. The graphs end at the hidden states, and logits
are computed where they are counted: they are most of the work.

Retrieval: a prompt of `--context` tokens states the numbers of many rooms among sentences and asks for all of them in another
order; the first two questions and answers are the examples. A question is solved if every token of the number is the most
likely one after the right answers of the earlier questions; those that the full caches solve are counted.

Budgets are those of each layer. A layer whose attention window the budget covers keeps its window.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
import torch
from kv_texts import KINDS, calibration
from process import argument_parser, save

import ryzen_compile as rc
from ryzen_compile import registry
from ryzen_compile.artifacts.package.manifest import Estimate
from ryzen_compile.builder.calibrate import calibrate
from ryzen_compile.builder.rewrite import RewriteConfig, rewrite
from ryzen_compile.errors import RyzenError
from ryzen_compile.evaluation.evaluated_decoder import open_decoder
from ryzen_compile.evaluation.intervals import bootstrap_ratio, wilson_proportion
from ryzen_compile.evaluation.token_decoders import SessionDecoder
from ryzen_compile.ir.interface_metadata import interface_of, write_interface
from ryzen_compile.ir.load import load
from ryzen_compile.ir.save import save as save_model
from ryzen_compile.text.tokenizer import TextTokenizer
from ryzen_passes.kv.scoring import find_scorer

Array = np.ndarray[Any, Any]

SCORES = registry.names("kv_scores")
CALIBRATED_SCORES = [score for score in SCORES if find_scorer(score).is_calibrated()]
SHARES = (0.5, 0.25, 0.125)
FULL = "full"
ROOMS, EXAMPLES, ANSWER_DIGITS = 12, 2, 3
FILLERS = (
    "The lift is checked every spring.",
    "Visitors leave their coats at the entrance.",
    "The corridor on the left leads to the garden.",
    "Coffee is served in the hall until four.",
)


def main() -> int:
    parser = argument_parser(__doc__, rounds=1)
    add_arguments(parser)
    parser.add_argument("--prompts", type=int, default=8, help="the prompts with questions [%(default)s]")
    args = parser.parse_args()
    model, head = prepare_model(args), read_head(args.folder)
    tokenizer = read_tokenizer(Path(args.folder))
    documents, kinds = read_documents(args, tokenizer)
    prompts, answers = make_prompts(args, tokenizer)
    configuration = {key: getattr(args, key) for key in ("context", "chunk", "documents", "prompts")} | {
        "kinds": kinds,
        "counted_tokens": len(documents) * (args.context // 2),
        "tokens_sha256": hashlib.sha256(documents.tobytes() + prompts.tobytes()).hexdigest(),
    }
    cases = read_cases(args.save, configuration)
    pipelines = make_pipelines(args, model)
    for name, passes in pipelines.items():
        if name in cases or not (name == FULL or re.search(args.cases, name)):
            continue
        try:
            with open_case(model, passes, args.rows) as (decoder, state_bytes):
                losses = measure_losses(decoder, head, documents, args)
                solved = measure_retrieval(decoder, head, prompts, answers, args)
        except RyzenError as error:
            print(f"{name}: refused: {error}", flush=True)
            continue
        measured = {"state_bytes": state_bytes, "losses": losses.tolist(), "solved": solved.astype(int).tolist()}
        full = measured if name == FULL else cases[FULL]
        passes = passes.replace(f"{args.work}/", "")
        cases[name] = {"passes": passes, **describe(measured, full, configuration), **measured}
        save(args.save, {**configuration, "cases": cases})
        print_case(name, cases[name])
    return 0


def read_cases(file: Path | None, configuration: dict[str, Any]) -> dict[str, Any]:
    """Return the cases in the results; refuses results of another configuration."""
    if file is None:
        raise SystemExit("name the file of the results with --save")
    if not file.exists():
        return {}
    results = json.loads(file.read_text(encoding="utf-8"))
    if different := [key for key, value in configuration.items() if results.get(key) != value]:
        raise SystemExit(f"{file} has results of another {different[0]}; remove it or name another file")
    cases: dict[str, Any] = results["cases"]
    return cases


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name the model and the cases."""
    parser.add_argument("folder")
    parser.add_argument("work", type=Path)
    parser.add_argument("--documents", type=int, default=5, help="the documents of each kind of text [%(default)s]")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--rows", type=int, default=4, help="the batch size [%(default)s]")
    parser.add_argument("--cases", default="", help="measure only the cases whose names match this regular expression")


def prepare_model(args: argparse.Namespace) -> Path:
    """Return the exported decoder without its head, which is written unless WORK has it."""
    args.work.mkdir(parents=True, exist_ok=True)
    model: Path = args.work / "hidden.onnx"
    if not model.exists():
        rc.export(f"hf:{args.folder}", args.work / "model.onnx")
        write_without_head(args.work / "model.onnx", model)
    return model


def read_head(folder: str) -> torch.Tensor:
    """Return the weights that map hidden states to logits, (hidden, vocabulary)."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return module.get_output_embeddings().weight.detach().T.contiguous()


def write_without_head(model: Path, path: Path) -> None:
    """Write the decoder in `model` with the hidden states before the last MatMul in place of the logits."""
    graph = load(model)
    interface = interface_of(graph)
    logits = next(output for output in graph.graph.outputs if output.name == "logits")
    matmul = logits.producer()
    if matmul is None or matmul.op_type != "MatMul" or (hidden := matmul.inputs[0]) is None or hidden.shape is None:
        raise SystemExit(f"the logits of {model} are not the result of a MatMul")
    identity = ir.node("Identity", [hidden])
    graph.graph.insert_after(matmul, identity)
    graph.graph.outputs[graph.graph.outputs.index(logits)] = identity.outputs[0]
    graph.graph.remove(matmul, safe=True)
    identity.outputs[0].name, identity.outputs[0].type, identity.outputs[0].shape = "logits", logits.type, hidden.shape
    dims = tuple(size if isinstance(size, int) else str(size) for size in hidden.shape)
    outputs = tuple(msgspec.structs.replace(spec, dims=dims) if spec.name == "logits" else spec for spec in interface.outputs)
    sizes = interface.max_sizes | {interface.batch or "batch": 64}  # without logits a batch takes little memory
    write_interface(graph, msgspec.structs.replace(interface, outputs=outputs, max_sizes=sizes))
    save_model(graph, path)


def read_tokenizer(folder: Path) -> TextTokenizer:
    """Return the tokenizer of the Hugging Face folder."""
    files = {file.name: file.read_bytes() for file in folder.glob("*.json") if "tokenizer" in file.name}
    return TextTokenizer(files, source=str(folder))


def read_documents(args: argparse.Namespace, tokenizer: TextTokenizer) -> tuple[Array, list[str]]:
    """Return documents of token ids, (documents, context), evenly spaced in each text, and the kind of each."""
    documents, kinds = [], []
    for kind, read_text in KINDS.items():
        start_token, *ids = tokenizer.encode(read_text())
        size = args.context - 1
        starts = np.linspace(0, len(ids) - size, args.documents).astype(int)
        documents += [np.array([start_token, *ids[start : start + size]]) for start in starts]
        kinds += [kind] * args.documents
    return np.stack(documents).astype(np.int64), kinds


def make_prompts(args: argparse.Namespace, tokenizer: TextTokenizer) -> tuple[Array, Array]:
    """Return prompts with questions and answers, (prompts, context), and the indices of the tokens of the counted answers.

    The indices are (questions, tokens of an answer), the same in all prompts, whose questions have the same lengths.
    """
    rows, answers = [], []
    for seed in range(args.prompts):
        random = np.random.default_rng(seed)
        rooms = random.choice(np.arange(100, 1000), ROOMS, replace=False)
        numbers = random.integers(10 ** (ANSWER_DIGITS - 1), 10**ANSWER_DIGITS, ROOMS)
        questions, ends = "", []
        for item in random.permutation(ROOMS):
            questions += f"\nQuestion: What is the number of room {rooms[item]}?\nAnswer: {numbers[item]}"
            ends.append(len(tokenizer.encode(questions)) - 1)
        question_ids = tokenizer.encode(questions)[1:]
        facts = [f"The number of room {room} is {number}." for room, number in zip(rooms, numbers, strict=True)]
        fact_tokens = len(tokenizer.encode("\n".join(facts)))
        filler_tokens = len(tokenizer.encode("\n".join(FILLERS))) / len(FILLERS)
        fillers = max(0, int((args.context - fact_tokens - len(question_ids)) / filler_tokens) - 2)
        lines = [*facts, *(FILLERS[index % len(FILLERS)] for index in range(fillers))]
        ids = np.concatenate(
            [tokenizer.encode("\n".join(lines[index] for index in random.permutation(len(lines)))), question_ids]
        )
        missing = args.context - len(ids)
        padding = np.resize(tokenizer.encode(" " + FILLERS[0])[1:], max(missing, 0))
        rows.append(np.concatenate([ids[:1], padding, ids[1:]]))
        answers.append(args.context - len(question_ids) + np.array(ends[EXAMPLES:]))
    if any(len(row) != args.context for row in rows):
        raise SystemExit("the questions do not fit in the context")
    if len({tuple(ends) for ends in answers}) > 1:
        raise SystemExit("the tokenizer splits numbers into different counts of tokens")
    answer_tokens = len(tokenizer.encode(f"Answer: {10 ** (ANSWER_DIGITS - 1)}")) - len(tokenizer.encode("Answer: "))
    return np.stack(rows).astype(np.int64), answers[0][:, None] - np.arange(answer_tokens, 0, -1)


def make_pipelines(args: argparse.Namespace, model: Path) -> dict[str, str]:
    """Return the passes by case; fits the statistics of calibrated scores that are needed and missing in WORK."""
    static = f"kv-static{{capacity={args.context}}}"
    pipelines = {FULL: static} | {
        f"{FULL}.{bits}": f"{static},kv-quant{{keys={bits},values={bits}}}" for bits in ("8", "fp8", "4")
    }
    pipelines[f"{FULL}.keys8.values4"] = f"{static},kv-quant{{keys=8,values=4}}"
    mean = fit(args, model, "key-mean", "kv-quant", [f"{FULL}.4.mean"])
    pipelines[f"{FULL}.4.mean"] = f"{static},kv-quant{{keys=4,values=4,statistics={mean}}}"
    for share in SHARES:
        budget = int(share * args.context)
        for score in SCORES:
            options = f"score={score},budget={budget}"
            if score in CALIBRATED_SCORES:
                cases = [f"{score}.{value:g}" for value in SHARES]
                options += f",statistics={fit(args, model, score, f'kv-evict{{score={score}}}', cases)}"
            pipelines[f"{score}.{share:g}"] = f"{static},kv-evict{{{options}}}"
        pipelines[f"window.{share:g}"] = f"{static},kv-window{{sinks=4,window={budget - 4}}}"
        pipelines[f"compact.{share:g}"] = f"{static},kv-compact{{budget={budget},append-slots=64,window=32}}"
        pipelines[f"value-norm.{share:g}.8"] = (
            f"{static},kv-evict{{score=value-norm,budget={budget}}},kv-quant{{keys=8,values=8}}"
        )
        pipelines[f"position.{share:g}.8"] = f"{static},kv-evict{{score=position,budget={budget}}},kv-quant{{keys=8,values=8}}"
    return pipelines


def fit(args: argparse.Namespace, model: Path, kind: str, pass_spec: str, cases: Sequence[str]) -> Path:
    """Return the file of the statistics of `kind`; they are fitted if one of `cases` is measured, unless WORK has them."""
    file: Path = args.work / f"{kind}.safetensors"
    if not file.exists() and any(re.search(args.cases, case) for case in cases):
        text = args.work / "calibration.txt"
        text.write_text(calibration(), encoding="utf-8")
        print(calibrate(model, file, pass_spec=pass_spec, data=str(text), documents=16), flush=True)
    return file


@contextmanager
def open_case(model: Path, passes: str, rows: int) -> Iterator[tuple[SessionDecoder, int]]:
    """Yield a decoder of `rows` sequences, and the bytes of the states of one."""
    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        path = Path(folder, "case.onnx")
        rewrite(model, path, RewriteConfig(passes=passes))
        with open_decoder(path, graph=None, variant=None, backend=None) as decoder, decoder.engine.session(rows) as session:
            yield SessionDecoder(session, name=passes), state_bytes(decoder.engine.interface)


def state_bytes(interface: Any) -> int:
    """Return the bytes of the states of one sequence, in the types of the graph."""
    total = 0
    for state in interface.states:
        spec = interface.input(state.input)
        sizes = [1 if isinstance(dim, str) else dim for dim in spec.dims or ()]
        total += (
            int(np.prod(sizes)) * np.dtype(spec.dtype if spec.dtype.startswith(("int", "uint", "float32")) else "int8").itemsize
        )
    return total


def hidden_states(decoder: SessionDecoder, ids: Array, first: int, chunk: int) -> torch.Tensor:
    """Feed `ids` (rows, tokens) in steps and return the hidden states of the tokens from `first` on, (rows, tokens, hidden)."""
    decoder.reset()
    states = []
    for start in range(0, ids.shape[1], chunk):
        step = decoder.step(ids[:, start : start + chunk])
        states.append(step[:, max(0, first - start) :])
    return torch.from_numpy(np.concatenate(states, axis=1))


def measure_losses(decoder: SessionDecoder, head: torch.Tensor, documents: Array, args: argparse.Namespace) -> Array:
    """Return the summed cross-entropy of the tokens in the second half of each document, (documents,), in nats."""
    losses, first = [], args.context // 2
    for start in range(0, len(documents), args.rows):
        ids = documents[start : start + args.rows]
        for states, targets in zip(
            hidden_states(decoder, ids[:, :-1], first - 1, args.chunk), torch.from_numpy(ids[:, first:]), strict=True
        ):
            blocks = zip(states.split(256), targets.split(256), strict=True)
            parts = [torch.nn.functional.cross_entropy(a @ head, b, reduction="none") for a, b in blocks]
            losses.append(torch.cat(parts).double().sum())
    return np.asarray(torch.stack(losses))


def measure_retrieval(
    decoder: SessionDecoder, head: torch.Tensor, prompts: Array, answers: Array, args: argparse.Namespace
) -> Array:
    """Return which questions are solved, (prompts * questions,) bool; `answers` are indices of tokens, (questions, tokens)."""
    solved: list[bool] = []
    first = int(answers.min()) - 1
    for start in range(0, len(prompts), args.rows):
        ids = prompts[start : start + args.rows]
        states = hidden_states(decoder, ids[:, :-1], first, args.chunk)
        predicted = (states[:, answers - 1 - first] @ head).argmax(dim=-1).numpy()
        solved += (predicted == ids[:, answers]).all(axis=-1).ravel().tolist()
    return np.array(solved)


def describe(measured: dict[str, Any], full: dict[str, Any], configuration: dict[str, Any]) -> dict[str, Any]:
    """Return the results of a measured case against the full caches."""
    kinds, losses, baseline = np.array(configuration["kinds"]), np.array(measured["losses"]), np.array(full["losses"])
    tokens = np.full(len(losses), configuration["context"] // 2)

    def ratio(rows: Array) -> Estimate:
        return bootstrap_ratio((losses - baseline)[rows], tokens[rows], seed=0, transform=np.exp)

    estimate = ratio(np.arange(len(losses)))
    solvable = np.array(full["solved"], bool)
    solved = wilson_proportion(np.array(measured["solved"], bool)[solvable])
    return {
        "memory": measured["state_bytes"] / full["state_bytes"],
        "perplexity": float(np.exp(losses.sum() / tokens.sum())),
        "perplexity_ratio": [estimate.value, estimate.low, estimate.high],
        "perplexity_ratio_by_kind": {
            kind: ratio(np.flatnonzero(kinds == kind)).value for kind in dict.fromkeys(kinds.tolist())
        },
        "worst_document": float(np.exp((losses - baseline) / tokens).max()),
        "questions": int(solvable.sum()),
        "retrieval": [solved.value, solved.low, solved.high],
    }


def print_case(name: str, result: dict[str, Any]) -> None:
    """Print the results of a case in a line."""
    ratio, low, high = result["perplexity_ratio"]
    by_kind = ", ".join(f"{kind} {value:.3f}" for kind, value in result["perplexity_ratio_by_kind"].items())
    print(
        f"{name:20} memory {result['memory']:.1%}, perplexity x{ratio:.4f} ({low:.4f} to {high:.4f}; {by_kind}), "
        f"retrieval {result['retrieval'][0]:.2f}",
        flush=True,
    )


if __name__ == "__main__":
    raise SystemExit(main())
