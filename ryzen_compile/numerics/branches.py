"""Branches of a model in a comparison: cases that reach them, and those that no case ran."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from ryzen_compile.errors import RyzenError

if TYPE_CHECKING:
    from ryzen_compile.numerics.candidate import Candidate
    from ryzen_compile.numerics.grid import GridCase
    from ryzen_compile.spec.interface import Interface


def _has_branches(model_file: Path) -> bool:
    status = model_file.stat()
    return _has_control_flow(model_file, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _has_control_flow(model_file: Path, size_bytes: int, modified_ns: int) -> bool:
    """Return whether a file of this size and time has branches; it is loaded once."""
    from ryzen_compile.ir.analysis.control_flow import has_control_flow
    from ryzen_compile.ir.load import load

    return has_control_flow(load(model_file))


def control_values(model_file: Path | None, interface: Interface) -> list[dict[str, int]]:
    """Return combinations of the values that determine which branches of a model run; empty for a model without branches."""
    from ryzen_compile.ir.analysis.control_flow import combinations_of, find_control_values
    from ryzen_compile.ir.load import load

    if model_file is None or not _has_branches(model_file):
        return []
    return combinations_of(find_control_values(load(model_file), interface))


def runnable_cases(cases: Iterable[GridCase], candidate: Candidate) -> list[str]:
    """Return the descriptions of the `cases` that `candidate` can run: a value that was made up may be invalid."""
    runnable = []
    with ExitStack() as resources:
        run = None
        for case in cases:
            try:
                run = run or resources.enter_context(candidate.open())
                run(case.inputs)
            except RyzenError:
                continue
            runnable.append(case.description)
    return runnable


def find_branches_not_run(model_file: Path | None, cases: Iterable[GridCase]) -> tuple[tuple[str, ...], str | None]:
    """Return `_branches_not_run`, and a note if it cannot be determined."""
    try:
        return _branches_not_run(model_file, cases), None
    except RyzenError as error:
        return (), f"it is not known which branches and loop bodies ran: {error.message}"


def _branches_not_run(model_file: Path | None, cases: Iterable[GridCase]) -> tuple[str, ...]:
    """Return the branches and loop bodies of a model that no case runs, without those inside of others that do not run.

    Only what the conditions depend on is run. The cases are drawn until every branch ran.
    """
    from ryzen_compile.ir.edit.branch_coverage import COVERAGE_OUTPUT, branch_coverage_graph
    from ryzen_compile.ir.load import load
    from ryzen_compile.ir.save import save
    from ryzen_compile.numerics.onnx_candidates import graph_precision, open_graph

    if model_file is None or not _has_branches(model_file):
        return ()
    graph, branches = branch_coverage_graph(load(model_file))
    ran = np.zeros(len(branches), bool)
    with TemporaryDirectory(prefix="ryzen-compile-") as folder:
        file = Path(folder, "branches.onnx")
        save(graph, file, weights="external")
        with open_graph(file, graph_precision(graph))() as run:
            for case in cases:
                ran |= run(case.inputs)[COVERAGE_OUTPUT]
                if ran.all():
                    return ()
    return tuple(
        branch.description
        for branch, has_run in zip(branches, ran, strict=True)
        if not has_run and (branch.parent is None or ran[branch.parent])
    )
