"""Sources: the graphs that a build starts from, and what is known of each before it is rewritten."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from ryzen_compile.errors import UsageError
from ryzen_compile.spec.interface import Interface
from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    import onnx_ir as ir

    from ryzen_compile.artifacts.cache.store import Store
    from ryzen_compile.ir.fingerprint import FileDigest

Model = str | os.PathLike[str]
HalfPrecision = Literal["fp16", "bf16"]

_ANALYSIS_KIND = "source.2"
"""Goes up with every change of what is learnt of a graph."""


class GraphSummary(Record, frozen=True):
    """What a build needs to know of a graph before it looks at its nodes; kept by the digest of the graph's files."""

    fingerprint: str
    interface: Interface
    node_names_digest: str
    """A digest of what the nodes are called."""
    half_precision: HalfPrecision | None
    """The half precision that it holds anywhere, if any."""


@dataclass(frozen=True, kw_only=True)
class SourceGraph:
    """One named graph to build."""

    name: str
    path: str
    summary: GraphSummary
    file_digest: FileDigest | None = None
    """The files as they were when `known` was; None where nobody asked."""
    _loaded: list[ir.Model] = field(default_factory=list)
    """The graph as it was read, once it was."""

    @property
    def file_name(self) -> str:
        """The file's name."""
        return Path(self.path).name

    def load(self) -> ir.Model:
        """Return the graph, anew each time; all share the weights in the file and what is known of them.

        Raises ModelError where the file is no longer the one that `known` tells of.
        """
        from ryzen_compile.ir.load import load

        if not self._loaded:
            self._loaded.append(load(self.path))
            if self.file_digest is not None:
                self.file_digest.check_unchanged()
        return self._loaded[0].clone()


def graph_files(model: Model | Mapping[str, Model]) -> dict[str, Path]:
    """Return the files to build by the names of their graphs; one file alone is called `model`.

    Of a folder these are the ONNX files in it, each called as its file. Raises UsageError for names that could not be file
    names.
    """
    if isinstance(model, (str, os.PathLike)):
        files = {path.stem: path for path in sorted(Path(model).glob("*.onnx"))} if Path(model).is_dir() else {"model": model}
    else:
        files = dict(model)
    if not files:
        raise UsageError("there is nothing to build", hint="name an ONNX file, or a folder of such")
    for name in files:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
            raise UsageError(f"`{name}` cannot name a graph", hint="use letters, digits, - and _, as in prefill=prefill.onnx")
    return {name: Path(path) for name, path in files.items()}


def read(files: Mapping[str, Path], store: Store | None) -> tuple[SourceGraph, ...]:
    """Read what is known of each file; raises ModelError. What `store` remembers of the same bytes is not computed again."""
    return tuple(_read_cached(name, path, store) for name, path in files.items())


def _read_cached(name: str, path: Path, store: Store | None) -> SourceGraph:
    if store is None:
        return _analyze(name, path)
    from ryzen_compile.ir.fingerprint import compute_file_digest

    content = compute_file_digest(path)
    remembered = store.cached_result(_ANALYSIS_KIND, content.digest)
    if remembered is not None:
        try:
            return SourceGraph(
                name=name, path=str(path), summary=msgspec.json.decode(remembered, type=GraphSummary), file_digest=content
            )
        except msgspec.ValidationError:
            pass  # damaged: learnt and remembered anew
    source = _analyze(name, path, content)
    store.cache_result(_ANALYSIS_KIND, content.digest, msgspec.json.encode(source.summary).decode())
    return source


def _analyze(name: str, path: Path, file_digest: FileDigest | None = None) -> SourceGraph:
    from ryzen_compile.ir.fingerprint import fingerprint
    from ryzen_compile.ir.interface_metadata import interface_of
    from ryzen_compile.ir.load import load

    model = load(path)
    if file_digest is not None:
        file_digest.check_unchanged()
    known = GraphSummary(
        fingerprint=fingerprint(model),
        interface=interface_of(model),
        node_names_digest=_digest_node_names(model),
        half_precision=half_precision_of(model),
    )
    return SourceGraph(name=name, path=str(path), summary=known, file_digest=file_digest, _loaded=[model])


def _digest_node_names(model: ir.Model) -> str:
    import blake3

    told = [(node.name or "", node.domain, node.op_type) for node in model.graph.all_nodes()]
    return blake3.blake3(msgspec.json.encode(told)).hexdigest()[:16]


def half_precision_of(model: ir.Model) -> HalfPrecision | None:
    """Return the half precision of inputs, outputs, weights and values, or None; where both are there, the coarser: bf16."""
    import onnx_ir as ir

    values = [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]
    found = {value.dtype for value in values}
    for node in model.graph.all_nodes():
        found.update(output.dtype for output in node.outputs)
        if node.op_type == "Cast":
            found.add(ir.DataType(node.attributes.get_int("to", 0)))
    return "bf16" if ir.DataType.BFLOAT16 in found else "fp16" if ir.DataType.FLOAT16 in found else None
