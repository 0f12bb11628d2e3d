"""Perplexity and retrieval of a real language model with each KV method, against the full caches.

    python benchmarks/kv_methods.py FOLDER WORK --text reference=FILE.txt --text code=FILE.txt ... [--cases REGEX] [--save FILE]

FOLDER is a Hugging Face folder. WORK keeps the exported model, the statistics of calibrated scores and one .npz file per
measured case, so that an interrupted run continues. The caches hold `--context` tokens; every document has as many and is fed
in steps of `--chunk` tokens. The perplexity counts the tokens in the second half of each document, where every budget up to a
half of the context evicts. A case is compared with the full caches document by document; its interval is bootstrapped over
documents. The graphs end at the hidden states, and logits are computed where they are counted: they are most of the work.

Retrieval: a prompt of `--context` tokens states the numbers of many rooms among sentences, and asks for some of them, with two
solved examples (few-shot). A question is solved if every token of the number is the most likely one; those that the full caches
solve are counted.

Budgets are those of each layer. A layer whose attention window the budget covers keeps its window.
"""

from __future__ import annotations

import argparse
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
ROOMS, ANSWER_DIGITS = 12, 3
FILLERS = (
    "The lift is checked every spring.",
    "Visitors leave their coats at the entrance.",
    "The corridor on the left leads to the garden.",
    "Coffee is served in the hall until four.",
)


def main() -> int:
    parser = argument_parser(__doc__, rounds=1)
    add_arguments(parser)
    parser.add_argument("--questions", type=int, default=32)
    args = parser.parse_args()
    model, head = prepare_model(args), read_head(args.folder)
    tokenizer = read_tokenizer(Path(args.folder))
    documents, kinds = read_documents(args, tokenizer)
    questions, answer_tokens = make_questions(args, tokenizer)
    pipelines = make_pipelines(args, model)
    for name, passes in pipelines.items():
        file = args.work / f"{name}.npz"
        if file.exists() or not re.search(args.cases, name):
            continue
        try:
            with open_case(model, passes, args.rows) as (decoder, state_bytes):
                losses = measure_losses(decoder, head, documents, args)
                solved = measure_retrieval(decoder, head, questions, answer_tokens, args)
        except RyzenError as error:
            print(f"{name}: refused: {error}", flush=True)
            continue
        np.savez(file, losses=losses, solved=solved, state_bytes=state_bytes)
        print_case(args.work, name, kinds)
    results = {name: describe(args.work, name, kinds) for name in pipelines if (args.work / f"{name}.npz").exists()}
    configuration = {key: getattr(args, key) for key in ("context", "chunk", "documents", "questions")} | {
        "kinds": sorted({*kinds}),
        "counted_tokens": len(documents) * (args.context // 2),
        "passes": {name: pipelines[name].replace(f"{args.work}/", "") for name in results},
    }
    save(args.save, {**configuration, "cases": results})
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name the model, the texts and the cases."""
    parser.add_argument("folder")
    parser.add_argument("work", type=Path)
    parser.add_argument("--text", action="append", default=[], metavar="KIND=FILE", help="a text of one kind; repeat")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="the text for calibrated scores, none of those above")
    parser.add_argument("--documents", type=int, default=5, help="the documents of each kind [%(default)s]")
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
    for item in args.text:
        kind, _, name = item.partition("=")
        ids = tokenizer.encode(Path(name).read_text(encoding="utf-8", errors="replace")[: args.context * args.documents * 40])
        start_token, ids = ids[:1], ids[1:]
        size = args.context - 1
        starts = np.linspace(0, len(ids) - size, args.documents).astype(int)
        documents += [np.concatenate([start_token, ids[start : start + size]]) for start in starts]
        kinds += [kind] * args.documents
    return np.stack(documents).astype(np.int64), kinds


def make_questions(args: argparse.Namespace, tokenizer: TextTokenizer) -> tuple[Array, int]:
    """Return prompts that end with their answers, (questions, context), and the number of tokens of an answer."""
    rows = []
    for seed in range(args.questions):
        random = np.random.default_rng(seed)
        rooms = random.choice(np.arange(100, 1000), ROOMS, replace=False)
        numbers = random.integers(10 ** (ANSWER_DIGITS - 1), 10**ANSWER_DIGITS, ROOMS)
        asked = random.choice(ROOMS, 3, replace=False)
        ending = "".join(f"\nQuestion: What is the number of room {rooms[item]}?\nAnswer: {numbers[item]}" for item in asked)
        ending_ids = tokenizer.encode(ending)[1:]
        facts = [f"The number of room {room} is {number}." for room, number in zip(rooms, numbers, strict=True)]
        body: list[str] = []
        fact_tokens = len(tokenizer.encode("\n".join(facts)))
        filler_tokens = len(tokenizer.encode("\n".join(FILLERS))) / len(FILLERS)
        fillers = max(0, int((args.context - fact_tokens - len(ending_ids)) / filler_tokens) - 2)
        lines = [*facts, *(FILLERS[index % len(FILLERS)] for index in range(fillers))]
        order = random.permutation(len(lines))
        body = [lines[index] for index in order]
        ids = np.concatenate([tokenizer.encode("\n".join(body)), ending_ids])
        missing = args.context - len(ids)
        padding = np.resize(tokenizer.encode(" " + FILLERS[0])[1:], max(missing, 0))
        ids = np.concatenate([ids[:1], padding, ids[1:]])
        rows.append(ids[:1] if missing < 0 else ids)
    if any(len(row) != args.context for row in rows):
        raise SystemExit("the questions do not fit in the context")
    answer = tokenizer.encode(f"Answer: {10 ** (ANSWER_DIGITS - 1)}")
    return np.stack(rows).astype(np.int64), len(answer) - len(tokenizer.encode("Answer: "))


def make_pipelines(args: argparse.Namespace, model: Path) -> dict[str, str]:
    """Return the passes by case; fits the statistics of calibrated scores that are needed and missing in WORK."""
    static = f"kv-static{{capacity={args.context}}}"
    pipelines = {FULL: static} | {
        f"{FULL}.{bits}": f"{static},kv-quant{{keys={bits},values={bits}}}" for bits in ("8", "fp8", "4")
    }
    pipelines[f"{FULL}.keys8.values4"] = f"{static},kv-quant{{keys=8,values=4}}"
    if args.calibration is not None:
        mean = fit(args, model, "key-mean", "kv-quant", [f"{FULL}.4.mean"])
        pipelines[f"{FULL}.4.mean"] = f"{static},kv-quant{{keys=4,values=4,statistics={mean}}}"
    for share in SHARES:
        budget = int(share * args.context)
        for score in SCORES:
            options = f"score={score},budget={budget}"
            if score in CALIBRATED_SCORES:
                if args.calibration is None:
                    continue
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
        print(calibrate(model, file, pass_spec=pass_spec, data=str(args.calibration), documents=16), flush=True)
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
    """Return the cross-entropy of the tokens in the second half of each document, (documents, context / 2), in nats."""
    losses, first = [], args.context // 2
    for start in range(0, len(documents), args.rows):
        ids = documents[start : start + args.rows]
        for states, targets in zip(
            hidden_states(decoder, ids[:, :-1], first - 1, args.chunk), torch.from_numpy(ids[:, first:]), strict=True
        ):
            blocks = zip(states.split(256), targets.split(256), strict=True)
            losses.append(torch.cat([torch.nn.functional.cross_entropy(a @ head, b, reduction="none") for a, b in blocks]))
    return np.asarray(torch.stack(losses).double())


def measure_retrieval(
    decoder: SessionDecoder, head: torch.Tensor, questions: Array, answer_tokens: int, args: argparse.Namespace
) -> Array:
    """Return which questions are solved, (questions,) bool."""
    solved = []
    for start in range(0, len(questions), args.rows):
        ids = questions[start : start + args.rows]
        states = hidden_states(decoder, ids[:, :-1], args.context - answer_tokens - 1, args.chunk)
        predicted = (states @ head).argmax(dim=-1).numpy()
        solved += (predicted == ids[:, -answer_tokens:]).all(axis=1).tolist()
    return np.array(solved)


def describe(work: Path, name: str, kinds: Sequence[str]) -> dict[str, Any]:
    """Return the results of a measured case against the full caches."""
    with np.load(work / f"{name}.npz") as case, np.load(work / f"{FULL}.npz") as full:
        losses, baseline = case["losses"], full["losses"]
        tokens = np.full(len(losses), losses.shape[1])

        def ratio(rows: Array) -> Estimate:
            extra = (losses - baseline)[rows].sum(axis=1)
            return bootstrap_ratio(extra, tokens[rows], seed=0, transform=np.exp)

        estimate, by_kind = ratio(np.arange(len(losses))), {}
        for kind in dict.fromkeys(kinds):
            by_kind[kind] = ratio(np.flatnonzero(np.array(kinds) == kind)).value
        solved = wilson_proportion(case["solved"][full["solved"]])
        return {
            "memory": float(case["state_bytes"] / full["state_bytes"]),
            "perplexity": float(np.exp(losses.mean())),
            "perplexity_ratio": [estimate.value, estimate.low, estimate.high],
            "perplexity_ratio_by_kind": by_kind,
            "worst_document": float(np.exp((losses - baseline).mean(axis=1)).max()),
            "questions": int(full["solved"].sum()),
            "retrieval": [solved.value, solved.low, solved.high],
        }


def print_case(work: Path, name: str, kinds: Sequence[str]) -> None:
    """Print the results of a case in a line."""
    result = describe(work, name, kinds)
    ratio, low, high = result["perplexity_ratio"]
    by_kind = ", ".join(f"{kind} {value:.3f}" for kind, value in result["perplexity_ratio_by_kind"].items())
    print(
        f"{name:20} memory {result['memory']:.1%}, perplexity x{ratio:.4f} ({low:.4f} to {high:.4f}; {by_kind}), "
        f"retrieval {result['retrieval'][0]:.2f}",
        flush=True,
    )


if __name__ == "__main__":
    raise SystemExit(main())
