"""Write the tables of the documentation that are generated from the code, between their markers.

    python docs/generate_tables.py [--check]

With `--check` nothing is written; the exit code is 1 if a page differs from the code.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ryzen_compile import registry
from ryzen_passes.kv.scoring import find_scorer

FOLDER = Path(__file__).parent


def scores() -> str:
    """Return the table of the scores of kv-evict that this project provides."""
    rows = [("score", "description", "time-dependent", "calibrated", "source"), ("---",) * 5]
    for name in registry.names("kv_scores"):
        scorer = find_scorer(name)
        if scorer.__module__.startswith("ryzen_passes."):
            time_dependent, calibrated = ("yes" if flag else "no" for flag in (scorer.time_dependent, scorer.is_calibrated()))
            rows.append((f"`{name}`", scorer.description, time_dependent, calibrated, scorer.paper))
    return _format_table(rows)


def _format_table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def frontier() -> str:
    """Return the table of the measured methods in benchmarks/results/frontier.json, with the full cache first."""
    cases = json.loads((FOLDER.parent / "benchmarks" / "results" / "frontier.json").read_text(encoding="utf-8"))["cases"]
    full_bytes = next(case["bytes"] for case in cases if case["method"] == "all" and case["bits"] == "16")
    tasks = ("needle", "recall", "copy")
    rows = [("kept", "memory, relative to all tokens in fp16", *tasks, "perplexity"), ("---",) * 6]
    order = sorted(
        cases, key=lambda case: (case["method"] != "all", case["method"], -case["chunk"], case["share"], case["bits"])
    )
    for case in order:
        kept = [case["method"]] if case["method"] == "all" else [f"`{case['method']}`", f"{100 * case['share']:g} %"]
        kept += {"16": [], "fp8": ["fp8"]}.get(case["bits"], [f"{case['bits']}-bit"])
        kept += ["prompt in one step"] if case["chunk"] > 64 else []
        questions = f" ({case['questions']} questions)" if case["questions"] != 48 else ""
        answers = (f"{round(case[task]['value'], 3):g}" for task in tasks)
        memory, perplexity = f"{100 * case['bytes'] / full_bytes:.1f} %", f"x {case['perplexity-ratio']['value']:.4f}"
        rows.append((", ".join(kept) + questions, memory, *answers, perplexity))
    return _format_table(rows)


def kv_methods() -> str:
    """Return the table of the methods measured on a real model in benchmarks/results/kv_methods.json."""
    results = json.loads((FOLDER.parent / "benchmarks" / "results" / "kv_methods.json").read_text(encoding="utf-8"))
    rows = [
        ("kept in each layer", "memory of all caches", "perplexity (95 % interval)", "worst document", "answers"),
        ("---",) * 5,
    ]
    order = sorted(results["cases"], key=lambda name: (not name.startswith("full"), *_method_and_share(name)))
    for name in order:
        case = results["cases"][name]
        method, share = _method_and_share(name)
        kept = f"`{method}`, {-100 * share:g} %" if share else _full_cache(case["passes"])
        ratio, low, high = case["perplexity_ratio"]
        perplexity = f"x {ratio:.4f} ({low:.4f} .. {high:.4f})"
        answers = f"{round(case['retrieval'][0] * case['questions'])} of {case['questions']}"
        rows.append((kept, f"{100 * case['memory']:.1f} %", perplexity, f"x {case['worst_document']:.3f}", answers))
    return _format_table(rows)


def _full_cache(passes: str) -> str:
    """Return what a case that evicts nothing does with all tokens."""
    _, _, quantization = passes.partition(",")
    return f"all tokens, `{quantization}`" if quantization else "all tokens"


def _method_and_share(name: str) -> tuple[str, float]:
    """Return the method, with its bits, and the negative share of the tokens that it keeps, of `knorm.0.25.8`; 0 if all."""
    match = re.fullmatch(r"(.*?)\.(0\.\d+)(?:\.(\d))?", name)
    if match is None:
        return name, 0
    method, share, bits = match.groups()
    return method + (f"`, `kv-quant{{keys={bits},values={bits}}}" if bits else ""), -float(share)


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "scores": ("kv/evict.md", scores),
    "frontier": ("kv/results.md", frontier),
    "kv-methods": ("kv/results.md", kv_methods),
}
"""Marker -> the page that contains it, and the function that returns its table."""


def main() -> int:
    """Write or check the tables."""
    is_check, differences = "--check" in sys.argv[1:], 0
    for marker, (name, make_table) in TABLES.items():
        page = FOLDER / name
        text = page.read_text(encoding="utf-8")
        begin, end = f"<!-- table: {marker} -->\n", f"<!-- end of table: {marker} -->"
        head, found, rest = text.partition(begin)
        _, closed, tail = rest.partition(end)
        if not found or not closed:
            print(f"{page}: the markers `{begin.strip()}` and `{end}` are missing")
            return 1
        expected = f"{head}{begin}{make_table()}\n{end}{tail}"
        if text == expected:
            continue
        differences += 1
        if is_check:
            print(
                *difflib.unified_diff(text.splitlines(), expected.splitlines(), name, "generated", lineterm="", n=0), sep="\n"
            )
        else:
            page.write_text(expected, encoding="utf-8")
            print(f"{page} written")
    return 1 if is_check and differences else 0


if __name__ == "__main__":
    sys.exit(main())
