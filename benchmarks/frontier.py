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

from ryzen_compile.builder.rewrite import Rewriting, rewrite
from ryzen_compile.errors import RyzenError
from ryzen_compile.evaluation.calibrate import calibrate
from ryzen_compile.evaluation.evaluated_decoder import opened
from ryzen_compile.evaluation.perplexity import foretell
from ryzen_compile.evaluation.systems import Columns
from ryzen_compile.evaluation.tasks import ask
from ryzen_compile.evaluation.token_decoders import SessionDecoder
from ryzen_compile.exporter import export
from ryzen_models.tinylm import RECIPE
from ryzen_models.tinylm.questions import CONTEXT

if TYPE_CHECKING:
    from collections.abc import Iterator

RESULTS = Path(__file__).parent / "results"
ROWS, CHUNK, SINKS, RECENT = 8, 64, 4, 32
SHARES = (0.125, 0.25, 0.375, 0.5, 0.75)
CALIBRATED = ("kvzap", "triattention")
SCORES = ("position", "knorm", "value-norm", "keydiff", *CALIBRATED)
PLOTTED = ("needle", "recall", "copy", "perplexity-ratio")
STATIC = f"kv-static{{capacity={CONTEXT}}}"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One stack of passes."""

    method: str
    share: float
    """Of the tokens that a head keeps; 1: all."""
    bits: str
    """How keys and values are kept: 16 bits, or codes of `fp8`, `8` or `4`."""

    chunk: int = CHUNK
    """How many tokens of a prompt a step takes."""

    def passes(self, folder: Path) -> str:
        """Return the passes; statistics lie in `folder`."""
        budget = int(self.share * CONTEXT)
        statistics = f",statistics={json.dumps(str(folder / self.method))}" if self.method in CALIBRATED else ""
        stacks = {
            "all": STATIC,
            "window": f"{STATIC},kv-window{{sinks={SINKS},window={budget - SINKS}}}",
            "compact": f"{STATIC},kv-compact{{budget={budget - RECENT},room={RECENT},window={RECENT}}}",
            **{
                score: f"{STATIC},kv-evict{{score={score},budget={budget},sinks={SINKS},recent={RECENT},every=16{statistics}}}"
                for score in SCORES
                if score == self.method
            },
        }
        quant = f",kv-quant{{keys={self.bits},values={self.bits}}}" if self.bits != "16" else ""
        return stacks[self.method] + quant


def cases(quick: bool) -> list[Case]:
    """Return what is measured."""
    if quick:
        return [Case(method="all", share=1, bits="16"), Case(method="kvzap", share=0.25, bits="16")]
    methods = (*SCORES, "window", "compact")
    lossy = [Case(method=method, share=share, bits="16") for method in methods for share in SHARES]
    whole = [Case(method="all", share=1, bits=bits) for bits in ("16", "fp8", "8", "4")]
    both = [Case(method="kvzap", share=share, bits=bits) for share in (0.25, 0.375, 0.5) for bits in ("8", "4")]
    at_once = [Case(method="compact", share=share, bits="16", chunk=CONTEXT) for share in SHARES]
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
def columns(full: Path, model: Path) -> Iterator[tuple[Columns, int]]:
    """Open both decoders."""
    with opened(full, graph=None, backend=None) as whole, opened(model, graph=None, backend=None) as lossy:
        with whole.engine.session(ROWS) as one, lossy.engine.session(ROWS) as other:
            pair = Columns(
                baseline=SessionDecoder(one, name="all"), method=None, subject=SessionDecoder(other, name="subject"), rows=ROWS
            )
            yield pair, state_bytes(lossy.engine.interface)


def measure(case: Case, model: Path, folder: Path, questions: int) -> dict[str, Any]:
    """Return the figures of one case."""
    evaluation = RECIPE.evaluation
    assert evaluation is not None
    full, made = folder / "full.onnx", folder / "case.onnx"
    if not full.exists():
        rewrite(model, full, Rewriting(passes=STATIC), weights="inline")
    rewrite(model, made, Rewriting(passes=case.passes(folder)), weights="inline")
    found: dict[str, Any] = {**asdict(case), "questions": questions}
    with columns(full, made) as (pair, size):
        found["bytes"] = size
        documents = list(itertools.islice(evaluation.streams(0), questions // 2))
        rows = foretell(pair, documents, chunk=case.chunk, seed=0)
        for task in evaluation.tasks:
            rows += ask(pair, task.name, [task.make(seed) for seed in range(questions)], chunk=case.chunk)
        for row in rows:
            if not row.part and row.name in ("perplexity", "perplexity-ratio", *(task.name for task in evaluation.tasks)):
                found[row.name] = asdict_of(row.subject)
                if row.baseline is not None:
                    found[f"{row.name} of all"] = row.baseline.value
    return found


def asdict_of(figure: Any) -> dict[str, Any]:
    """Return a figure with its interval."""
    return {name: getattr(figure, name) for name in figure.__struct_fields__}


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Draw answers and perplexity against memory."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(18, 4.2), sharex=True)
    whole = next(one["bytes"] for one in found if one["method"] == "all" and one["bits"] == "16")
    lines: dict[str, list[dict[str, Any]]] = {}
    for one in found:
        more = "" if one["bits"] == "16" else f", {one['bits']} bit"
        lines.setdefault(one["method"] + more + (", prompt at once" if one["chunk"] == CONTEXT else ""), []).append(one)
    for axis, name in zip(axes, PLOTTED, strict=True):
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
        sizes = {"batch": ROWS, "seq": CONTEXT, "past": CONTEXT}
        export(replace(RECIPE, interface=msgspec.structs.replace(RECIPE.interface, largest=sizes)), model)
        for score in sorted({one.method for one in wanted} & {*CALIBRATED}):
            by = f"kv-evict{{score={score},recent={RECENT}}}"
            print(calibrate(model, folder / score, for_pass=by, data="recipe:tinylm", documents=8 if chosen.quick else 128))
        for case in wanted:
            try:
                found = measure(case, model, folder, questions)
            except RyzenError as error:
                found = {**asdict(case), "refused": str(error)}
            figures = {task: round(found[task]["value"], 4) for task in PLOTTED if task in found}
            print(case.method, case.share, case.bits, found.get("bytes"), found.get("refused") or figures, flush=True)
            if not chosen.quick:
                keep(found)


def keep(found: dict[str, Any]) -> None:
    """Put a case into the table, and draw it anew."""
    table = RESULTS / "frontier.json"
    old = json.loads(table.read_text())["cases"] if table.exists() else []
    key = {name: found[name] for name in ("method", "share", "bits", "chunk")}
    every = [one for one in old if any(one[name] != value for name, value in key.items())] + [found]
    told = {"machine": machine(), "cases": every}
    table.write_text(json.dumps(told, indent=1) + "\n")
    try:
        plot([one for one in every if "refused" not in one], RESULTS / "frontier.svg")
    except ImportError:
        print("matplotlib is not there: no plot")


if __name__ == "__main__":
    main()
