"""Compression of a sentence encoder on real weights and texts: size, accuracy and speed of each recipe, beside ONNX Runtime's.

    python benchmarks/compression.py WORK [--cases REGEX] [--sentences 500] [--rounds 30] [--save FILE]

The encoder is all-MiniLM-L6-v2 in fp32, exported here. Accuracy is the cosine similarity of mean-pooled embeddings with those
of the fp32 model, and the Spearman correlation of the similarities of all pairs of sentences. Sentences are those of
`kv_texts.py`, evenly spaced; calibration uses sentences of another text. The size is that of the written file with its weights.
Speeds are those of ONNX Runtime on one thread, in runs that alternate with the fp32 model; `fp32 again` is the same file twice,
and shows the noise. WORK keeps the files, so that an interrupted run continues.

The peers are the quantizers of ONNX Runtime, with the options that measured best: dynamic quantization with a scale per
channel, static quantization of MatMul and Gather in QDQ format, and MatMulNBits by rounding (RTN) and HQQ, with quantized
Gather.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from kv_texts import KINDS, calibration
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
from process import argument_parser, median, save

import ryzen_compile as rc
from ryzen_compile.errors import RyzenError
from ryzen_models.minilm import embed, tokenize

Array = np.ndarray[Any, Any]
Writer = Callable[[Path, Path], Any]
"""A function that reads a graph and writes a compressed one."""

SHAPES = ((1, 32), (1, 128), (1, 256), (8, 32), (8, 128), (8, 256))
"""(batch, tokens) of the timed runs."""
CALIBRATION_SENTENCES = 128
_FAILURES = (RuntimeError, ValueError, RyzenError, ort_errors.Fail, ort_errors.InvalidGraph, ort_errors.NotImplemented)
OURS = {
    "int8": "quantize-weights",
    "fp8": "quantize-weights{format=fp8}",
    "int4 rtn": "quantize-weights{format=int4}",
    "int4 search": "quantize-weights{format=int4,algorithm=search}",
    "int4 gptq": "quantize-weights{format=int4,algorithm=gptq}",
}


def main() -> int:
    parser = argument_parser(__doc__, rounds=30)
    parser.add_argument("work", type=Path)
    parser.add_argument("--sentences", type=int, default=500)
    parser.add_argument("--cases", default="", help="measure only the cases whose names match this regular expression")
    args = parser.parse_args()
    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.WARNING)
    args.work.mkdir(parents=True, exist_ok=True)
    model = args.work / "minilm.onnx"
    if not model.exists():
        rc.export("recipe:minilm", model, opset=17)  # ONNX Runtime refuses what its quantizers make of opset 23
    sentences = read_sentences(args.sentences)
    baseline = open_session(model)
    expected = embeddings(baseline, sentences)
    cases: dict[str, Any] = {}
    writers: dict[str, Writer] = {**own_cases(), **peers(), "fp32 again": shutil.copyfile}
    for name, write in writers.items():
        if not re.search(args.cases, name):
            continue
        path = args.work / f"{name.replace(' ', '-')}.onnx"
        started = time.perf_counter()
        try:
            if not path.exists():
                write(model, path)
            session = open_session(path)
        except _FAILURES as error:  # a peer that fails is a result
            cases[name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
            print(name, cases[name], flush=True)
            continue
        seconds = time.perf_counter() - started
        result: dict[str, Any] = {
            "seconds": seconds,
            "smaller": size_of(model) / size_of(path),
            **accuracy(expected, embeddings(session, sentences)),
        }
        if args.rounds:
            result["speed"] = {
                f"{batch}x{tokens}": speed(baseline, session, batch, tokens, args.rounds) for batch, tokens in SHAPES
            }
        cases[name] = result
        speeds = " ".join(f"{value:.2f}" for value in result.get("speed", {}).values())
        print(
            f"{name:24} {result['smaller']:.2f}x smaller, cosine {result['mean']:.4f} (least {result['least']:.4f}), "
            f"Spearman {result['spearman']:.4f}, speed {speeds}",
            flush=True,
        )
    save(args.save, {"sentences": len(sentences), "shapes": SHAPES, "cases": cases})
    return 0


def read_sentences(count: int) -> list[str]:
    """Return sentences of 20 to 1,200 characters, evenly spaced in each kind of text."""
    found: list[str] = []
    per_kind = -(-count // len(KINDS))
    for read_text in KINDS.values():
        sentences = split_sentences(read_text())
        found += [sentences[index] for index in np.linspace(0, len(sentences) - 1, per_kind).astype(int)]
    return found[:count]


def split_sentences(text: str) -> list[str]:
    """Return the sentences and paragraphs of a text, every seventh joined with those before it, so that lengths vary."""
    parts = [" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+|\n\n+", text)]
    sentences = [part for part in parts if 20 <= len(part) <= 1200]
    return [" ".join(sentences[index - index % 7 : index + 1])[:1200] for index in range(len(sentences))]


def calibration_samples() -> Iterator[dict[str, Array]]:
    """Yield the calibration sentences in batches of 8."""
    sentences = split_sentences(calibration())
    chosen = [sentences[index] for index in np.linspace(0, len(sentences) - 1, CALIBRATION_SENTENCES).astype(int)]
    for start in range(0, len(chosen), 8):
        yield tokenize(chosen[start : start + 8])


def own_cases() -> dict[str, Writer]:
    """Return functions that write the graphs of this tool."""

    def writer(passes: str) -> Writer:
        return lambda source, path: rc.rewrite(
            source, path, passes=f"fold,{passes}", data=f"{Path(__file__)}:calibration_samples"
        )

    return {name: writer(passes) for name, passes in OURS.items()}


def peers() -> dict[str, Writer]:
    """Return functions that write the graphs of ONNX Runtime's quantizers."""
    from onnxruntime import quantization as q
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    class Reader(q.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.samples = calibration_samples()

        def get_next(self) -> dict[str, Array] | None:
            return next(self.samples, None)

    def dynamic(source: Path, path: Path) -> None:
        q.quantize_dynamic(source, path, weight_type=q.QuantType.QInt8, per_channel=True)

    def static(source: Path, path: Path) -> None:
        q.quantize_static(
            source,
            path,
            Reader(),
            op_types_to_quantize=["MatMul", "Gather"],
            per_channel=True,
            activation_type=q.QuantType.QInt8,
            weight_type=q.QuantType.QInt8,
        )

    def blocks(config: Any) -> Writer:
        def write(source: Path, path: Path) -> None:
            quantizer = nbits.MatMulNBitsQuantizer(onnx.load(source), algo_config=config)
            quantizer.process()
            quantizer.model.save_model_to_file(str(path))

        return write

    ops = ("MatMul", "Gather")
    return {
        "ort dynamic int8": dynamic,
        "ort static int8": static,
        "ort nbits int4 rtn": blocks(
            nbits.DefaultWeightOnlyQuantConfig(
                block_size=32,
                is_symmetric=True,
                accuracy_level=4,
                op_types_to_quantize=ops,
                quant_axes=(("MatMul", 0), ("Gather", 1)),
            )
        ),
        "ort nbits int4 hqq": blocks(nbits.HQQWeightOnlyQuantConfig(block_size=32, bits=4)),
        "ort nbits int8": blocks(
            nbits.DefaultWeightOnlyQuantConfig(block_size=128, is_symmetric=True, accuracy_level=4, bits=8)
        ),
    }


def open_session(path: Path) -> ort.InferenceSession:
    """Return a session with one thread, in which products of uint8 and int8 do not saturate on CPUs without VNNI."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def embeddings(session: ort.InferenceSession, sentences: list[str]) -> Array:
    """Return the embeddings of sentences, (sentences, 384), from batches of 8."""
    batches = [tokenize(sentences[start : start + 8]) for start in range(0, len(sentences), 8)]
    return np.concatenate([embed(session.run(None, batch)[0], batch["attention_mask"]) for batch in batches])


def accuracy(expected: Array, actual: Array) -> dict[str, float]:
    """Return the mean and the least cosine similarity, and the Spearman correlation of the similarities of all pairs."""
    cosines = (expected * actual).sum(axis=1)
    pairs = np.triu_indices(len(expected), 1)
    ranks = [np.argsort(np.argsort((vectors @ vectors.T)[pairs])) for vectors in (expected, actual)]
    return {
        "mean": float(cosines.mean()),
        "least": float(cosines.min()),
        "spearman": float(np.corrcoef(ranks[0], ranks[1])[0, 1]),
    }


def speed(baseline: ort.InferenceSession, session: ort.InferenceSession, batch: int, tokens: int, rounds: int) -> float:
    """Return the median of how many times as fast `session` is, in alternating runs."""
    ids = np.random.default_rng(0).integers(1000, 20000, (batch, tokens))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    ratios = []
    for round_index in range(rounds + 2):
        times = []
        for run in (baseline, session):
            started = time.perf_counter()
            run.run(None, inputs)
            times.append(time.perf_counter() - started)
        if round_index >= 2:
            ratios.append(times[0] / times[1])
    return median(ratios)


def size_of(path: Path) -> int:
    """Return the bytes of a model and its external weights."""
    return sum(file.stat().st_size for file in (path, path.with_name(f"{path.name}.data")) if file.exists())


if __name__ == "__main__":
    raise SystemExit(main())
