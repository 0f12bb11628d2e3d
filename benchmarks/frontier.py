"""What KV methods cost tinylm: answers and perplexity against the memory of the caches, each method at each budget.

Subject and baseline, caches that keep all 1,024 tokens, are fed the same on ONNX Runtime: prompts in steps of 64 tokens, or
all in one, and answers token by token. Memory is of a sequence's states, keys and values at the two bytes that
`precision{to=fp16}` gives them, scores, positions and scales included. Writes benchmarks/results/frontier.json and, where
matplotlib is there, frontier.svg; cases that are not measured this time stay as they were.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from process import machine

from ryzen_compile.builder.rewrite import RewriteConfig, rewrite
from ryzen_compile.errors import RyzenError
from ryzen_compile.evaluation.calibrate import calibrate
from ryzen_compile.evaluation.evaluated_decoder import open_decoder
from ryzen_compile.evaluation.perplexity import measure_perplexity
from ryzen_compile.evaluation.systems import Systems
from ryzen_compile.evaluation.tasks import measure_task
from ryzen_compile.evaluation.token_decoders import SessionDecoder
from ryzen_compile.exporter import export
from ryzen_models.tinylm import RECIPE
from ryzen_models.tinylm.questions import CONTEXT_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

RESULTS = Path(__file__).parent / "results"
BATCH_SIZE, CHUNK_SIZE, SINKS, RECENT = 8, 64, 4, 32
BUDGET_SHARES = (0.125, 0.25, 0.375, 0.5, 0.75)
CALIBRATED_SCORES = ("kvzap", "triattention")
SCORES = ("position", "knorm", "value-norm", "keydiff", *CALIBRATED_SCORES)
PLOTTED_METRICS = ("needle", "recall", "copy", "perplexity-ratio")
STATIC_PASS = f"kv-static{{capacity={CONTEXT_BYTES}}}"


@dataclass(frozen=True, kw_only=True)
class FrontierCase:
    """One stack of passes."""

    method: str
    share: float
    """Of the tokens that a head keeps; 1: all."""
    bits: str
    """How keys and values are kept: 16 bits, or codes of `fp8`, `8` or `4`."""

    chunk: int = CHUNK_SIZE
    """How many tokens of a prompt a step takes."""

    def passes(self, folder: Path) -> str:
        """Return the passes; statistics lie in `folder`."""
        budget = int(self.share * CONTEXT_BYTES)
        statistics = f",statistics={json.dumps(str(folder / self.method))}" if self.method in CALIBRATED_SCORES else ""
        stacks = {
            "all": STATIC_PASS,
            "window": f"{STATIC_PASS},kv-window{{sinks={SINKS},window={budget - SINKS}}}",
            "compact": f"{STATIC_PASS},kv-compact{{budget={budget - RECENT},append-slots={RECENT},window={RECENT}}}",
            **{
                score: f"{STATIC_PASS},kv-evict{{score={score},budget={budget},sinks={SINKS},recent-window={RECENT},rescore-interval=16{statistics}}}"
                for score in SCORES
                if score == self.method
            },
        }
        quant = f",kv-quant{{keys={self.bits},values={self.bits}}}" if self.bits != "16" else ""
        return stacks[self.method] + quant


def cases(quick: bool) -> list[FrontierCase]:
    """Return what is measured."""
    if quick:
        return [FrontierCase(method="all", share=1, bits="16"), FrontierCase(method="kvzap", share=0.25, bits="16")]
    methods = (*SCORES, "window", "compact")
    lossy = [FrontierCase(method=method, share=share, bits="16") for method in methods for share in BUDGET_SHARES]
    whole = [FrontierCase(method="all", share=1, bits=bits) for bits in ("16", "fp8", "8", "4")]
    both = [FrontierCase(method="kvzap", share=share, bits=bits) for share in (0.25, 0.375, 0.5) for bits in ("8", "4")]
    at_once = [FrontierCase(method="compact", share=share, bits="16", chunk=CONTEXT_BYTES) for share in BUDGET_SHARES]
    return whole + lossy + at_once + both


def state_bytes(interface: Any) -> int:
    """Return the bytes of one sequence's states, floats of keys and values at two bytes each."""
    found = 0
    for state in interface.states:
        spec = interface.input(state.input)
        elements = math.prod(1 if isinstance(dim, str) else dim for dim in spec.dims or ())
        is_cache = len(spec.dims or ()) == 4 and spec.dtype.startswith("float")
        found += elements * (
            2 if is_cache and spec.dtype == "float32" else {"float32": 4, "int32": 4, "int64": 8}.get(spec.dtype, 1)
        )
    return found


@contextmanager
def open_systems(baseline_path: Path, candidate_path: Path) -> Iterator[tuple[Systems, int]]:
    """Open both decoders."""
    with (
        open_decoder(baseline_path, graph=None, backend=None) as whole,
        open_decoder(candidate_path, graph=None, backend=None) as lossy,
    ):
        with whole.engine.session(BATCH_SIZE) as one, lossy.engine.session(BATCH_SIZE) as other:
            pair = Systems(
                baseline=SessionDecoder(one, name="all"),
                method=None,
                candidate=SessionDecoder(other, name="candidate"),
                batch_size=BATCH_SIZE,
            )
            yield pair, state_bytes(lossy.engine.interface)


def measure(case: FrontierCase, model: Path, folder: Path, questions: int) -> dict[str, Any]:
    """Return the figures of one case."""
    evaluation = RECIPE.evaluation
    assert evaluation is not None
    full, made = folder / "full.onnx", folder / "case.onnx"
    if not full.exists():
        rewrite(model, full, RewriteConfig(passes=STATIC_PASS), weights="inline")
    rewrite(model, made, RewriteConfig(passes=case.passes(folder)), weights="inline")
    found: dict[str, Any] = {**asdict(case), "questions": questions}
    with open_systems(full, made) as (pair, size):
        found["bytes"] = size
        documents = list(itertools.islice(evaluation.streams(0), questions // 2))
        rows = measure_perplexity(pair, documents, chunk_size=case.chunk, seed=0)
        for task in evaluation.tasks:
            rows += measure_task(
                pair, task.name, [task.make_question(seed) for seed in range(questions)], chunk_size=case.chunk
            )
        for row in rows:
            if not row.group and row.name in ("perplexity", "perplexity-ratio", *(task.name for task in evaluation.tasks)):
                found[row.name] = estimate_as_dict(row.candidate)
                if row.baseline is not None:
                    found[f"{row.name} of all"] = row.baseline.value
    return found


def estimate_as_dict(estimate: Any) -> dict[str, Any]:
    """Return a figure with its interval."""
    return {name: getattr(estimate, name) for name in estimate.__struct_fields__}


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draw answers and perplexity against memory."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(18, 4.2), sharex=True)
    whole = next(one["bytes"] for one in results if one["method"] == "all" and one["bits"] == "16")
    lines: dict[str, list[dict[str, Any]]] = {}
    for one in results:
        more = "" if one["bits"] == "16" else f", {one['bits']} bit"
        lines.setdefault(one["method"] + more + (", prompt at once" if one["chunk"] == CONTEXT_BYTES else ""), []).append(one)
    for axis, name in zip(axes, PLOTTED_METRICS, strict=True):
        for line, ones in lines.items():
            ones = sorted(ones, key=lambda one: one["bytes"])
            style = {"marker": "o", "label": line, "linestyle": "--" if "bit" in line else "-"}
            axis.plot([100 * one["bytes"] / whole for one in ones], [one[name]["value"] for one in ones], **style)
        axis.set(title=name, xlabel="memory of the caches, % of all tokens in fp16", xscale="log")
    axes[3].set_ylim(0.99, 1.05)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=96)
    parser.add_argument("--methods", help="only these, separated by commas, in this order")
    parser.add_argument("--shares", help="only these of the tokens, separated by commas")
    parser.add_argument("--chunk", type=int, help="only where a step of a prompt takes so many")
    parser.add_argument("--quick", action="store_true", help="two cases and few questions, to see that it runs")
    chosen = parser.parse_args()
    questions = 8 if chosen.quick else chosen.questions
    every = cases(chosen.quick)
    names = chosen.methods.split(",") if chosen.methods is not None else [*dict.fromkeys(one.method for one in every)]
    shares = {*map(float, chosen.shares.split(","))} if chosen.shares is not None else {one.share for one in every}
    wanted = [one for name in names for one in every if one.method == name and one.share in shares]
    wanted = [one for one in wanted if chosen.chunk in (None, one.chunk)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "tinylm.onnx"
        sizes = {"batch": BATCH_SIZE, "seq": CONTEXT_BYTES, "past": CONTEXT_BYTES}
        export(replace(RECIPE, interface=msgspec.structs.replace(RECIPE.interface, max_sizes=sizes)), model)
        for score in sorted({one.method for one in wanted} & {*CALIBRATED_SCORES}):
            by = f"kv-evict{{score={score},recent-window={RECENT}}}"
            print(calibrate(model, folder / score, pass_spec=by, data="recipe:tinylm", documents=8 if chosen.quick else 128))
        for case in wanted:
            try:
                found = measure(case, model, folder, questions)
            except RyzenError as error:
                found = {**asdict(case), "refused": str(error)}
            figures = {task: round(found[task]["value"], 4) for task in PLOTTED_METRICS if task in found}
            print(case.method, case.share, case.bits, found.get("bytes"), found.get("refused") or figures, flush=True)
            if not chosen.quick:
                save_case(found)


def save_case(result: dict[str, Any]) -> None:
    """Put a case into the table, and draw it anew."""
    table = RESULTS / "frontier.json"
    old = json.loads(table.read_text())["cases"] if table.exists() else []
    key = {name: result[name] for name in ("method", "share", "bits", "chunk")}
    every = [one for one in old if any(one[name] != value for name, value in key.items())] + [result]
    told = {"machine": machine(), "cases": every}
    table.write_text(json.dumps(told, indent=1) + "\n")
    try:
        plot([one for one in every if "refused" not in one], RESULTS / "frontier.svg")
    except ImportError:
        print("matplotlib is not there: no plot")


if __name__ == "__main__":
    main()
