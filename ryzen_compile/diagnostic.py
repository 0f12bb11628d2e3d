"""Diagnostics: errors, warnings and information for the user as records, and the table of their codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "info"]
"""error: the request, or the named part of it, was not fulfilled. warning: it was, but the result needs attention. info: what
was done and why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnostic:
    """One error, warning or piece of information about a command, as `--json` prints it and as exceptions carry it."""

    code: str
    """A stable identifier for programs: a key of `CODES`, or the code of a rule in another package's `rules.toml`."""
    severity: Severity
    message: str
    """One line that names the object, its actual value and the expected value."""
    location: str | None = None
    """The node, tensor, file, graph, target or pass that the message is about, by the user's name for it; None: the request."""
    hint: str | None = None
    """The command or the edit that resolves the problem."""

    def __str__(self) -> str:
        return f"{self.location}: {self.message}" if self.location else self.message


CODES: Mapping[str, str] = {
    # Errors of a kind of exception, where no narrower code below applies.
    "refused": "A valid request cannot be fulfilled.",
    "usage": "The request is malformed: an unknown option, or a value that cannot be parsed or is out of range.",
    "model": "A model file is unreadable, truncated or inconsistent.",
    "pipeline": "The passes of a pipeline cannot be used together or in this command.",
    "backend": "A backend rejected a graph or an engine, or its process died.",
    "package": "A package is damaged, unsafe or from another version.",
    "shape": "A tensor does not match the interface or the profiles of a graph or engine.",
    "accuracy": "Nothing was compared, or an exported graph differs from its module.",
    "internal-error": "An exception that no command expects: a defect of this program or of an installed package.",
    # Pipelines.
    "property-missing": "A pass requires a property that does not hold for the model.",
    "property-invalidated": "A pass requires a property that an earlier pass invalidates.",
    "pass-refused": "A pass cannot be applied to the model; the location is the node or tensor that prevents it.",
    "pass-failed": "A pass stopped with an unexpected exception.",
    "pass-defect": "A pass violates its own declaration.",
    "contradictory-graph": "The shapes or types of a graph contradict each other after a pass, which reveals or causes it.",
    "pass-changed": "What a pass changed in the graph.",
    "pass-unchanged": "Why a pass had nothing to change.",
    "pass-moved": "A pass runs earlier than it was listed, because properties require it.",
    "pass-left-out": "A requested pass does not run for a backend.",
    "pass-added": "A pass runs for a backend although it was not requested.",
    "node-unchanged": "A pass left a part of the graph as it was.",
    # Builds and packages.
    "target-refused": "No engine was built for a target.",
    "not-compared": "A variant could not be compared with its source.",
    "branch-not-run": "No case of a comparison ran a branch or loop body of the model, so it was not compared.",
    "criterion-not-met": "A measured value does not meet its criterion.",
    "comparison-fault": "A comparison failed independently of its criteria: a NaN, a missing output, another shape.",
    "pass-warning": "What to know about the result of a pass before relying on it.",
    "engine-warning": "A backend warned while it built an engine.",
    "package-written": "The package, at its location, was written with its measurements although the build failed.",
    "module-compared": "How well an exported graph agrees with its module, where the graph itself is not kept.",
    "shapes-derived": "No shapes were given, so the build derived them from the interface.",
    "values-derived": "The source runs with certain values of an input only, and random values are restricted to them.",
    "option-translated": "An option of another tool was accepted, with this meaning.",
    "half-precision": "A graph for a backend without half precision was converted to half precision.",
    "output-exists": "The output path is a file, or a folder that is not a package.",
    "unlisted-file": "A package folder contains a file that is not part of the package.",
    # The cache.
    "cache-hit": "A result was taken from the cache.",
    "cache-wait": "The command waits for another process that uses the cache.",
    "cache-damaged": "A cache entry was damaged and is built again.",
    "cache-not-written": "A result was not stored in the cache.",
    "cache-disabled": "The cache folder is not used.",
    # Other commands.
    "evaluation-started": "How much an evaluation measures.",
    "calibration-started": "How much a calibration runs.",
    "engine-chosen": "Which engine or graph of a package runs on this machine, and why.",
    "bisect-failed": "The first divergent node could not be found.",
    "kernel-compiled": "A kernel of a custom op was compiled for a GPU.",
    "op-checked": "The kernel of a custom op was compared with its reference.",
    "member-unavailable": "A pass, op or backend of an installed package cannot be imported, or is not declared correctly.",
    "backend-available": "What a backend does on this machine.",
    "backend-unavailable": "A backend cannot be used on this machine.",
    "distribution-conflict": "Two installed distributions provide the same module.",
}
"""The meaning of every code that this project emits, by code. docs/diagnostics.md shows the same table."""
