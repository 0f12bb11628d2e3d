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
from ryzen_compile.builder.default_pipelines import order_and_validate, pipeline_for
from ryzen_compile.errors import RyzenError, UsageError, printable
from ryzen_compile.pipeline import parser
from ryzen_compile.pipeline.pass_manager import run_passes, satisfied_properties
from ryzen_compile.progress import Progress, SilentProgress
from ryzen_compile.spec.passes import PassContext

if TYPE_CHECKING:
    import onnx_ir as ir

    from ryzen_compile.pipeline.ordering import Move
    from ryzen_compile.spec.pass_record import PassRecord
    from ryzen_compile.spec.passes import Pass

_ANY_WIDTH = "any"
"""How steps of any number of tokens are spelt."""
_WEIGHT_STORE_THRESHOLD_BYTES = 4096
"""From this size on a weight is a file that all graphs of a folder share."""


@dataclass(frozen=True, kw_only=True)
class RewriteConfig:
    """What to do to a model."""

    passes: str
    """As `kv-static{capacity=4096},kv-evict{budget=25%}`."""
    backend: str = "onnxruntime"
    """What the result is for."""
    data: str | None = None
    """Calibration samples."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class RewriteResult:
    """A file that was written, and the journal of its passes."""

    path: str
    passes: tuple[PassRecord, ...]
    excluded_from_package: tuple[Pass, ...]
    """Passes that a package for this backend would leave out, and that were run."""
    moves: tuple[Move, ...]


def rewrite(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: RewriteConfig,
    *,
    weights: Literal["auto", "inline", "external"] = "auto",
    progress: Progress | None = None,
) -> RewriteResult:
    """Run passes on the ONNX file `model` and write what they leave to `output`; raises RyzenError where one refuses."""
    from ryzen_compile.ir.load import load
    from ryzen_compile.ir.save import save

    graph = load(model)
    done = _rewrite_graph(graph, str(output), config, _parse_passes(config), progress or SilentProgress())
    save(graph, output, weights=weights)
    return done


def rewrite_steps(
    model: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    config: RewriteConfig,
    widths: Sequence[int],
    *,
    progress: Progress | None = None,
) -> tuple[RewriteResult, ...]:
    """Write a graph for each of several widths of steps to `folder`: `step-1.onnx`, `step-any.onnx`, over one store of weights.

    A width is a number of tokens, 0 any number. They are steps of one decoder over the same states; a build of the folder is
    one package, and loading that one engine. Nothing is written before all of them are made. Raises UsageError where no pass
    knows of steps, else what `rewrite` raises.
    """
    from ryzen_compile.ir.fingerprint import fingerprint
    from ryzen_compile.ir.interface_metadata import interface_of, write_interface
    from ryzen_compile.ir.load import load
    from ryzen_compile.ir.save import save_to_store

    passes = _parse_passes(config)
    if not any(hasattr(pass_, "step") for pass_ in passes):
        raise UsageError("none of these passes makes steps of a decoder", hint="begin with kv-static{capacity=4096}")
    source, folder = load(model), Path(folder)
    if os.path.lexists(folder) and not folder.is_dir():
        raise RyzenError(f"`{printable(str(folder))}` is there and is no folder", hint="name a folder to write the graphs to")
    family = _decoder_group(fingerprint(source), config)
    made: list[tuple[Path, ir.Model, RewriteResult]] = []
    for width in dict.fromkeys(widths):
        graph, path = source.clone(), folder / f"step-{width or _ANY_WIDTH}.onnx"
        wide = tuple(_with_step_width(pass_, width) for pass_ in passes)
        done = _rewrite_graph(graph, str(path), config, wide, progress or SilentProgress())
        write_interface(graph, msgspec.structs.replace(interface_of(graph), decoder_group=family))
        made.append((path, graph, done))
    for path, graph, _ in made:
        save_to_store(graph, path, folder / "weights", threshold_bytes=_WEIGHT_STORE_THRESHOLD_BYTES)
    return tuple(done for _, _, done in made)


def parse_step_widths(text: str) -> tuple[int, ...]:
    """Read `1,128,any`: how many tokens the steps of each graph take, 0 for any; raises UsageError."""
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word != _ANY_WIDTH and not (word.isascii() and word.isdigit() and 0 < int(word) < 2**31):
            raise UsageError(f"`{word}` is no width of a step", hint="write tokens, or any: --steps 1,any")
    return tuple(0 if word == _ANY_WIDTH else int(word) for word in words)


def _parse_passes(config: RewriteConfig) -> tuple[Pass, ...]:
    return parser.parse("" if config.passes == "none" else config.passes)


def _with_step_width(pass_: Pass, width: int) -> Pass:
    return dataclasses.replace(pass_, step=width) if hasattr(pass_, "step") else pass_  # type: ignore[type-var]


def _decoder_group(fingerprint: str, config: RewriteConfig) -> str:
    import blake3

    told = (fingerprint, config.passes, config.backend, config.data, config.seed)
    return blake3.blake3(msgspec.json.encode(told)).hexdigest()[:16]


def _rewrite_graph(
    graph: ir.Model, path: str, config: RewriteConfig, passes: tuple[Pass, ...], progress: Progress
) -> RewriteResult:
    """Run `passes` on `graph` in place; every one is run, also one that would be left out of a package."""
    from ryzen_compile.data.loading import load_samples
    from ryzen_compile.ir.interface_metadata import interface_of
    from ryzen_compile.pipeline.range_measurement import measure_ranges

    registry.find_backend(config.backend)
    planned = pipeline_for(config.backend, passes=config.passes, precision=None, source_half_precision=None)
    asked = dataclasses.replace(planned, passes=passes, notes=())
    kept = {pass_.name for pass_ in planned.passes}
    facts = registry.properties_of(asked.passes)
    plan, moves = order_and_validate(asked, satisfied_properties(graph, facts))
    interface = interface_of(graph) if plan.needs_calibration else None
    samples = list(load_samples(config.data, interface, seed=config.seed)) if config.data and interface else ()
    context = PassContext(
        backend=config.backend,
        interface=interface,
        samples=samples,
        measure_ranges=measure_ranges,
        seed=config.seed,
        progress=progress,
    )
    steps = run_passes(graph, plan.passes, context, facts)
    left_out = tuple(pass_ for pass_ in passes if pass_.name not in kept)
    return RewriteResult(path=path, passes=steps, excluded_from_package=left_out, moves=tuple(moves))
