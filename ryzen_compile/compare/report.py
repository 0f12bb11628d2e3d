"""The report of a comparison: plain lines for people, whatever reads JSON reads the record itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ryzen_compile.compare.run import Comparison

MEASURES = 30
"""How many measures that are met a report lists; those that are not met are all listed, and the record holds every one."""


def render(comparison: Comparison) -> str:
    """Return what was compared, a table of every measure at its worst, and the verdict."""
    result = comparison.accuracy
    met = [metric for metric in result.metrics if metric.met]
    listed = met[:MEASURES]
    shown = [metric for metric in result.metrics if not metric.met or metric in listed]
    lines = [
        f"{result.subject}",
        f"  against {result.baseline}",
        f"  on {result.where}, {result.cases} case{'s' if result.cases != 1 else ''}, {comparison.seconds:.1f} s",
        f"  held to {result.criteria}, {comparison.precision}: {comparison.limits}",
        "",
        *_table(
            ("output", "measure", "worst", "required", "", "where"),
            (
                (
                    metric.output,
                    metric.name,
                    f"{metric.worst:.7g}" if "cosine" in metric.name else f"{metric.worst:.3g}",
                    metric.required or "told only",
                    "" if metric.required is None else "met" if metric.met else "NOT MET",
                    metric.case,
                )
                for metric in shown
            ),
        ),
    ]
    if len(met) > MEASURES:
        lines.append(f"and {len(met) - MEASURES} further measures, all met: --json lists them")
    lines += [f"FAULT: {fault}" for fault in result.faults]
    lines += [f"note: {note}" for note in result.notes]
    lines += [f"not executed: {one}" for one in comparison.not_executed]
    lines.append(f"{'MET' if result.met else 'NOT MET'}: {comparison.subject} against {comparison.baseline}")
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return rows as lines of left-aligned columns; nothing where there is no row."""
    body = list(rows)
    if not body:
        return []
    widths = [max(len(row[at]) for row in (head, *body)) for at in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *body)]
