"""Rewriting: passes on an ONNX file, and what they leave as files, without building anything."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from ryzen_compile import registry
from ryzen_compile.builder.default_pipelines import plan_for, settle
from ryzen_compile.errors import RyzenError, UsageError, shown
from ryzen_compile.pipeline import parser
from ryzen_compile.pipeline.pass_manager import holding, run
from ryzen_compile.progress import Progress, Silent
from ryzen_compile.spec.passes import Context

if TYPE_CHECKING:
    import onnx_ir as ir

    from ryzen_compile.pipeline.ordering import Move
    from ryzen_compile.spec.pass_record import Step
    from ryzen_compile.spec.passes import Pass

_ANY = "any"
"""How steps of any number of tokens are spelt."""
_STORE_BYTES = 4096
"""From this size on a weight is a file that all graphs of a folder share."""


@dataclass(frozen=True, kw_only=True)
class Rewriting:
    """What to do to a model."""

    passes: str
    """As `kv-static{capacity=4096},kv-evict{budget=25%}`."""
    backend: str = "onnxruntime"
    """What the result is for."""
    data: str | None = None
    """Calibration samples."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Rewritten:
    """A file that was written, and the journal of its passes."""

    path: str
    steps: tuple[Step, ...]
    left_out: tuple[Pass, ...]
    """Passes that a package for this backend would leave out, and that were run."""
    moves: tuple[Move, ...]


def rewrite(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    rewriting: Rewriting,
    *,
    weights: Literal["auto", "inline", "external"] = "auto",
    progress: Progress | None = None,
) -> Rewritten:
    """Run passes on the ONNX file `model` and write what they leave to `output`; raises RyzenError where one refuses."""
    from ryzen_compile.ir.load import load
    from ryzen_compile.ir.save import save

    graph = load(model)
    done = _run(graph, str(output), rewriting, _passes(rewriting), progress or Silent())
    save(graph, output, weights=weights)
    return done


def rewrite_steps(
    model: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    rewriting: Rewriting,
    widths: Sequence[int],
    *,
    progress: Progress | None = None,
) -> tuple[Rewritten, ...]:
    """Write a graph for each of several widths of steps to `folder`: `step-1.onnx`, `step-any.onnx`, over one store of weights.

    A width is a number of tokens, 0 any number. They are steps of one decoder over the same states; a build of the folder is
    one package, and loading that one engine. Nothing is written before all of them are made. Raises UsageError where no pass
    knows of steps, else what `rewrite` raises.
    """
    from ryzen_compile.ir.fingerprint import fingerprint
    from ryzen_compile.ir.interface_metadata import attach, interface_of
    from ryzen_compile.ir.load import load
    from ryzen_compile.ir.save import save_to_store

    passes = _passes(rewriting)
    if not any(hasattr(pass_, "step") for pass_ in passes):
        raise UsageError("none of these passes makes steps of a decoder", hint="begin with kv-static{capacity=4096}")
    source, folder = load(model), Path(folder)
    if os.path.lexists(folder) and not folder.is_dir():
        raise RyzenError(f"`{shown(str(folder))}` is there and is no folder", hint="name a folder to write the graphs to")
    family = _family(fingerprint(source), rewriting)
    made: list[tuple[Path, ir.Model, Rewritten]] = []
    for width in dict.fromkeys(widths):
        graph, path = source.clone(), folder / f"step-{width or _ANY}.onnx"
        wide = tuple(_of_width(pass_, width) for pass_ in passes)
        done = _run(graph, str(path), rewriting, wide, progress or Silent())
        attach(graph, msgspec.structs.replace(interface_of(graph), family=family))
        made.append((path, graph, done))
    for path, graph, _ in made:
        save_to_store(graph, path, folder / "weights", threshold_bytes=_STORE_BYTES)
    return tuple(done for _, _, done in made)


def read_widths(text: str) -> tuple[int, ...]:
    """Read `1,128,any`: how many tokens the steps of each graph take, 0 for any; raises UsageError."""
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word != _ANY and not (word.isascii() and word.isdigit() and 0 < int(word) < 2**31):
            raise UsageError(f"`{word}` is no width of a step", hint="write tokens, or any: --steps 1,any")
    return tuple(0 if word == _ANY else int(word) for word in words)


def _passes(rewriting: Rewriting) -> tuple[Pass, ...]:
    return parser.parse("" if rewriting.passes == "none" else rewriting.passes)


def _of_width(pass_: Pass, step: int) -> Pass:
    return dataclasses.replace(pass_, step=step) if hasattr(pass_, "step") else pass_  # type: ignore[type-var]


def _family(source: str, rewriting: Rewriting) -> str:
    import blake3

    told = (source, rewriting.passes, rewriting.backend, rewriting.data, rewriting.seed)
    return blake3.blake3(msgspec.json.encode(told)).hexdigest()[:16]


def _run(graph: ir.Model, path: str, rewriting: Rewriting, passes: tuple[Pass, ...], progress: Progress) -> Rewritten:
    """Run `passes` on `graph` in place; every one is run, also one that would be left out of a package."""
    from ryzen_compile.data.loading import named
    from ryzen_compile.ir.interface_metadata import interface_of
    from ryzen_compile.pipeline.range_measurement import observe

    registry.find_backend(rewriting.backend)
    planned = plan_for(rewriting.backend, passes=rewriting.passes, precision=None, half_source=None)
    asked = dataclasses.replace(planned, passes=passes, notes=())
    kept = {pass_.name for pass_ in planned.passes}
    facts = registry.facts_of(asked.passes)
    plan, moves = settle(asked, holding(graph, facts))
    interface = interface_of(graph) if plan.calibrates else None
    samples = list(named(rewriting.data, interface, seed=rewriting.seed)) if rewriting.data and interface else ()
    context = Context(
        backend=rewriting.backend,
        interface=interface,
        samples=samples,
        observe=observe,
        seed=rewriting.seed,
        progress=progress,
    )
    steps = run(graph, plan.passes, context, facts)
    left_out = tuple(pass_ for pass_ in passes if pass_.name not in kept)
    return Rewritten(path=path, steps=steps, left_out=left_out, moves=tuple(moves))
