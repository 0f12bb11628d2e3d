"""Accuracy against memory of KV methods on tinylm: task accuracy and perplexity of each method at each budget.

The candidate and the baseline, whose caches keep all 1,024 tokens, run on the same inputs in ONNX Runtime: prompts in steps of
64 tokens or in one step, answers token by token. Memory is that of the states of one sequence: keys and values at two bytes per
element, as with `precision{to=fp16}`, plus scores, positions and scales. Writes benchmarks/results/frontier.json and, if
matplotlib is installed, frontier.svg; cases that are not measured in a run keep their previous results.
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

from ryzen_compile import registry
from ryzen_compile.builder.calibrate import calibrate
from ryzen_compile.builder.rewrite import RewriteConfig, rewrite
from ryzen_compile.errors import RyzenError
from ryzen_compile.evaluation.evaluated_decoder import open_decoder
from ryzen_compile.evaluation.perplexity import measure_perplexity
from ryzen_compile.evaluation.systems import Systems
from ryzen_compile.evaluation.tasks import measure_task
from ryzen_compile.evaluation.token_decoders import SessionDecoder
from ryzen_compile.exporter import export
from ryzen_models.tinylm import RECIPE
from ryzen_models.tinylm.questions import CONTEXT_BYTES
from ryzen_passes.kv.scoring import find_scorer

if TYPE_CHECKING:
    from collections.abc import Iterator

RESULTS = Path(__file__).parent / "results"
BATCH_SIZE, CHUNK_SIZE, SINKS, RECENT = 8, 64, 4, 32
BUDGET_SHARES = (0.125, 0.25, 0.375, 0.5, 0.75)
SCORES = registry.names("kv_scores")
CALIBRATED_SCORES = [score for score in SCORES if find_scorer(score).is_calibrated()]
PLOTTED_METRICS = ("needle", "recall", "copy", "perplexity-ratio")
STATIC_PASS = f"kv-static{{capacity={CONTEXT_BYTES}}}"


@dataclass(frozen=True, kw_only=True)
class FrontierCase:
    """One cache configuration."""

    method: str
    share: float
    """The share of the tokens that a head keeps; 1: all."""
    bits: str
    """The storage type of keys and values: `16`, `fp8`, `8` or `4` bits."""

    chunk: int = CHUNK_SIZE
    """The number of prompt tokens per step."""

    def passes(self, folder: Path) -> str:
        """Return the pipeline; statistics files are in `folder`."""
        budget = int(self.share * CONTEXT_BYTES)
        statistics = f",statistics={json.dumps(str(folder / self.method))}" if self.method in CALIBRATED_SCORES else ""
        evict_options = f"budget={budget},sinks={SINKS},recent-window={RECENT},rescore-interval=16{statistics}"
        pipelines = {
            "all": STATIC_PASS,
            "window": f"{STATIC_PASS},kv-window{{sinks={SINKS},window={budget - SINKS}}}",
            "compact": f"{STATIC_PASS},kv-compact{{budget={budget - RECENT},append-slots={RECENT},window={RECENT}}}",
            **{score: f"{STATIC_PASS},kv-evict{{score={score},{evict_options}}}" for score in SCORES},
        }
        quantization = f",kv-quant{{keys={self.bits},values={self.bits}}}" if self.bits != "16" else ""
        return pipelines[self.method] + quantization


def cases(quick: bool) -> list[FrontierCase]:
    """Return the cases to measure."""
    if quick:
        return [FrontierCase(method="all", share=1, bits="16"), FrontierCase(method="kvzap", share=0.25, bits="16")]
    methods = (*SCORES, "window", "compact")
    evicting = [FrontierCase(method=method, share=share, bits="16") for method in methods for share in BUDGET_SHARES]
    full = [FrontierCase(method="all", share=1, bits=bits) for bits in ("16", "fp8", "8", "4")]
    evicting_quantized = [
        FrontierCase(method="kvzap", share=share, bits=bits) for share in (0.25, 0.375, 0.5) for bits in ("8", "4")
    ]
    single_step = [FrontierCase(method="compact", share=share, bits="16", chunk=CONTEXT_BYTES) for share in BUDGET_SHARES]
    return full + evicting + single_step + evicting_quantized


def state_bytes(interface: Any) -> int:
    """Return the bytes of the states of one sequence, with keys and values at two bytes per float."""
    total = 0
    for state in interface.states:
        spec = interface.input(state.input)
        elements = math.prod(1 if isinstance(dim, str) else dim for dim in spec.dims or ())
        is_cache = len(spec.dims or ()) == 4 and spec.dtype.startswith("float")
        total += elements * (
            2 if is_cache and spec.dtype == "float32" else {"float32": 4, "int32": 4, "int64": 8}.get(spec.dtype, 1)
        )
    return total


@contextmanager
def open_systems(baseline_path: Path, candidate_path: Path) -> Iterator[tuple[Systems, int]]:
    """Open both decoders; yield them with the state bytes of the candidate."""
    with (
        open_decoder(baseline_path, graph=None, variant=None, backend=None) as baseline,
        open_decoder(candidate_path, graph=None, variant=None, backend=None) as candidate,
    ):
        with (
            baseline.engine.session(BATCH_SIZE) as baseline_session,
            candidate.engine.session(BATCH_SIZE) as candidate_session,
        ):
            systems = Systems(
                baseline=SessionDecoder(baseline_session, name="all"),
                method=None,
                candidate=SessionDecoder(candidate_session, name="candidate"),
                batch_size=BATCH_SIZE,
            )
            yield systems, state_bytes(candidate.engine.interface)


def measure(case: FrontierCase, model: Path, folder: Path, questions: int) -> dict[str, Any]:
    """Return the results of one case, or raise RyzenError if the passes refuse it."""
    evaluation = RECIPE.evaluation
    assert evaluation is not None
    baseline_path, candidate_path = folder / "full.onnx", folder / "case.onnx"
    if not baseline_path.exists():
        rewrite(model, baseline_path, RewriteConfig(passes=STATIC_PASS), weights="inline")
    rewrite(model, candidate_path, RewriteConfig(passes=case.passes(folder)), weights="inline")
    result: dict[str, Any] = {**asdict(case), "questions": questions}
    with open_systems(baseline_path, candidate_path) as (systems, size):
        result["bytes"] = size
        documents = list(itertools.islice(evaluation.documents(0), questions // 2))
        metrics = measure_perplexity(systems, documents, chunk_size=case.chunk, seed=0)
        for task in evaluation.tasks:
            metrics += measure_task(
                systems, task.name, [task.make_question(seed) for seed in range(questions)], chunk_size=case.chunk
            )
        names = ("perplexity", "perplexity-ratio", *(task.name for task in evaluation.tasks))
        for metric in metrics:
            if not metric.group and metric.name in names:
                result[metric.name] = estimate_as_dict(metric.candidate)
                if metric.baseline is not None:
                    result[f"{metric.name} of all"] = metric.baseline.value
    return result


def estimate_as_dict(estimate: Any) -> dict[str, Any]:
    """Return an estimate with its interval as a dictionary."""
    return {name: getattr(estimate, name) for name in estimate.__struct_fields__}


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Plot task accuracy and perplexity against memory."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(18, 4.2), sharex=True)
    full_bytes = next(result["bytes"] for result in results if result["method"] == "all" and result["bits"] == "16")
    lines: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        bits = "" if result["bits"] == "16" else f", {result['bits']} bit"
        chunk = ", prompt in one step" if result["chunk"] == CONTEXT_BYTES else ""
        lines.setdefault(result["method"] + bits + chunk, []).append(result)
    for axis, name in zip(axes, PLOTTED_METRICS, strict=True):
        for label, points in lines.items():
            points = sorted(points, key=lambda result: result["bytes"])
            style = {"marker": "o", "label": label, "linestyle": "--" if "bit" in label else "-"}
            memory = [100 * result["bytes"] / full_bytes for result in points]
            axis.plot(memory, [result[name]["value"] for result in points], **style)
        axis.set(title=name, xlabel="cache memory, % of all tokens in fp16", xscale="log")
    axes[3].set_ylim(0.99, 1.05)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    """Measure the selected cases and save each result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=96)
    parser.add_argument("--methods", help="only these methods, separated by commas, in this order")
    parser.add_argument("--shares", help="only these shares of the tokens, separated by commas")
    parser.add_argument("--chunk", type=int, help="only cases with this number of prompt tokens per step")
    parser.add_argument("--quick", action="store_true", help="two cases and few questions, as a smoke test; saves nothing")
    args = parser.parse_args()
    questions = 8 if args.quick else args.questions
    all_cases = cases(args.quick)
    names = args.methods.split(",") if args.methods is not None else [*dict.fromkeys(case.method for case in all_cases)]
    shares = {*map(float, args.shares.split(","))} if args.shares is not None else {case.share for case in all_cases}
    selected = [
        case
        for name in names
        for case in all_cases
        if case.method == name and case.share in shares and args.chunk in (None, case.chunk)
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "tinylm.onnx"
        sizes = {"batch": BATCH_SIZE, "seq": CONTEXT_BYTES, "past": CONTEXT_BYTES}
        export(replace(RECIPE, interface=msgspec.structs.replace(RECIPE.interface, max_sizes=sizes)), model)
        for score in sorted({case.method for case in selected} & {*CALIBRATED_SCORES}):
            pass_spec = f"kv-evict{{score={score},recent-window={RECENT}}}"
            print(
                calibrate(model, folder / score, pass_spec=pass_spec, data="recipe:tinylm", documents=8 if args.quick else 128)
            )
        for case in selected:
            try:
                result = measure(case, model, folder, questions)
            except RyzenError as error:
                if args.quick:
                    raise
                result = {**asdict(case), "refused": str(error)}
            values = {metric: round(result[metric]["value"], 4) for metric in PLOTTED_METRICS if metric in result}
            print(case.method, case.share, case.bits, result.get("bytes"), result.get("refused") or values, flush=True)
            if not args.quick:
                save_case(result)


def save_case(result: dict[str, Any]) -> None:
    """Add or replace a case in the table and redraw the plot."""
    table = RESULTS / "frontier.json"
    old = json.loads(table.read_text())["cases"] if table.exists() else []
    key = {name: result[name] for name in ("method", "share", "bits", "chunk")}
    kept = [case for case in old if any(case[name] != value for name, value in key.items())]
    results = [*kept, result]
    table.write_text(json.dumps({"machine": machine(), "cases": results}, indent=1) + "\n")
    try:
        plot([case for case in results if "refused" not in case], RESULTS / "frontier.svg")
    except ImportError:
        print("matplotlib is not installed: no plot is drawn")


if __name__ == "__main__":
    main()
