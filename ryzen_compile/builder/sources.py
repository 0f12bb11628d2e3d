"""Sources: the graphs that a build starts from, and the summary of each before it is rewritten."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from ryzen_compile.artifacts.package.layout import MANIFEST_NAME
from ryzen_compile.builder.code_key import CodeKey, code_key
from ryzen_compile.errors import UsageError, printable
from ryzen_compile.jobs.executor import LocalExecutor
from ryzen_compile.jobs.job import Job, JobKey, JobOutput, runs
from ryzen_compile.progress import Progress, SilentProgress
from ryzen_compile.spec.dtypes import HalfPrecision
from ryzen_compile.spec.interface import Interface
from ryzen_compile.spec.legalization_pass import GraphContents
from ryzen_compile.spec.text_files import TextFiles
from ryzen_compile.utils.files import StrPath
from ryzen_compile.utils.path_hints import folder_content_hint
from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    import onnx_ir as ir

    from ryzen_compile.artifacts.cache.store import Store
    from ryzen_compile.ir.fingerprint import FileDigest


class GraphSummary(Record, frozen=True):
    """What a build needs from a graph without reading its nodes; cached by the digest of the graph's files."""

    fingerprint: str
    interface: Interface
    node_names_digest: str
    """A digest of the names of the nodes."""
    metadata_digest: str
    """A digest of the model's metadata without the interface; variants keep the metadata of their source."""
    half_precision: HalfPrecision | None
    """The half-precision type that occurs in the graph, if any."""
    contents: GraphContents
    text_files: TextFiles | None = None
    """Where the tokenizer of the graph is; None if it has none."""
    branch_values: tuple[dict[str, int], ...] = ()
    """Combinations of values of the inputs that determine which branches run; empty without such inputs."""


@dataclass(frozen=True, kw_only=True)
class SourceGraph:
    """One named graph to build."""

    name: str
    path: str
    summary: GraphSummary
    file_digest: FileDigest | None = None
    """The digest of the files at the time of `summary`; None if it was not computed."""
    _loaded: list[ir.Model] = field(default_factory=list)
    """The graph as read from the file: empty until the first load, then one element."""

    @property
    def absolute_path(self) -> str:
        """The path of the file, independent of the working directory."""
        return os.path.abspath(self.path)

    @property
    def file_name(self) -> str:
        """The name of the file, without its folder."""
        return Path(self.path).name

    def load(self) -> ir.Model:
        """Return a new copy of the graph; all copies share the weights in the file and their digests.

        Raises ModelError if the file has changed since `summary` was computed.
        """
        from ryzen_compile.ir.load import load

        if not self._loaded:
            self._loaded.append(load(self.path))
            if self.file_digest is not None:
                self.file_digest.check_unchanged()
        return self._loaded[0].clone()


def graph_files(model: StrPath | Mapping[str, StrPath]) -> dict[str, Path]:
    """Return the files to build, by graph name. A single file has the graph name `model`.

    A folder stands for the ONNX files in it, each named after its file. Raises UsageError if there is no file, or if a graph
    name could not be a file name.
    """
    if isinstance(model, (str, os.PathLike)):
        folder = Path(model)
        is_package = (folder / MANIFEST_NAME).is_file()  # reading it as a model is refused with a hint
        graphs = {path.stem: path for path in sorted(folder.glob("*.onnx"))}
        files = graphs if folder.is_dir() and not is_package else {"model": model}
    else:
        files = dict(model)
    if not files:
        if isinstance(model, (str, os.PathLike)):
            hint = folder_content_hint(model, "name an ONNX file, or a folder of ONNX files")
            raise UsageError(f"`{printable(model)}` holds no ONNX file", hint=hint)
        raise UsageError("there is nothing to build", hint="name an ONNX file, or a folder of ONNX files")
    for name in files:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
            raise UsageError(
                f"`{name}` is not a valid graph name",
                hint="use letters, digits, - and _ (at most 64 characters), as in prefill=prefill.onnx",
            )
    return {name: Path(path) for name, path in files.items()}


def read(files: Mapping[str, Path], store: Store | None) -> tuple[SourceGraph, ...]:
    """Return the source graph of each file, with summaries from `store` where it has them for the same bytes.

    Raises ModelError if a file cannot be read.
    """
    return tuple(_read_cached(name, path, store) for name, path in files.items())


def read_tokenizer(graphs: Sequence[SourceGraph]) -> dict[str, bytes]:
    """Return the files of the tokenizer of `graphs`, {name: content}; empty if none has one.

    Raises UsageError if two graphs have different tokenizers, and ModelError if a file is missing or was changed.
    """
    from ryzen_compile.ir.text_files import read_recorded_files

    tokenizers = {graph.name: read_recorded_files(graph.summary.text_files, graph.path) for graph in graphs}
    first, *others = [(name, files) for name, files in tokenizers.items() if files] or [("", {})]
    for name, files in others:
        if files != first[1]:
            raise UsageError(
                f"`{first[0]}` and `{name}` have different tokenizers, and a package holds one",
                hint="build one package of each",
            )
    return first[1]


class SummaryKey(JobKey, frozen=True):
    """The key of the summary of one graph."""

    kind: ClassVar[str] = "summary"

    code: CodeKey
    file: str
    """The digest of the graph's files."""


class SummaryJob(Job[GraphSummary], frozen=True, kw_only=True):
    """Summarize one graph."""

    result_type: ClassVar[Any] = GraphSummary

    key: SummaryKey
    graph: str
    """The path of the graph."""

    def reuse_message(self, result: GraphSummary) -> None:
        """Return None: the user did not ask for a summary."""


@runs(SummaryJob)
def run_summary_job(job: SummaryJob, folder: Path, progress: Progress) -> JobOutput[GraphSummary]:
    """Read the graph and summarize it. Raises ModelError if the file cannot be read."""
    from ryzen_compile.ir.load import load

    return JobOutput(result=_summarize(load(folder / job.graph)))


def _read_cached(name: str, path: Path, store: Store | None) -> SourceGraph:
    from ryzen_compile.ir.fingerprint import compute_file_digest

    if store is None:
        model = _load(path)
        return SourceGraph(name=name, path=str(path), summary=_summarize(model), _loaded=[model])
    file_digest = compute_file_digest(path)
    loaded: list[ir.Model] = []

    def keep_loaded(job: SummaryJob, folder: Path, progress: Progress) -> JobOutput[GraphSummary]:
        loaded.append(_load(path))
        file_digest.check_unchanged()
        return JobOutput(result=_summarize(loaded[0]))

    job = SummaryJob(
        key=SummaryKey(code=code_key(), file=file_digest.digest), inputs={str(path): file_digest.digest}, graph=str(path)
    )
    executor = LocalExecutor(store, SilentProgress(), functions={SummaryJob: keep_loaded})
    summary = executor.run(job, Path()).result
    return SourceGraph(name=name, path=str(path), summary=summary, file_digest=file_digest, _loaded=loaded)


def _load(path: Path) -> ir.Model:
    from ryzen_compile.ir.load import load  # imported here: a build from the cache reads no graph

    return load(path)


def _summarize(model: ir.Model) -> GraphSummary:
    from ryzen_compile.ir.analysis.control_flow import combinations_of, find_control_values
    from ryzen_compile.ir.analysis.graph_contents import graph_contents
    from ryzen_compile.ir.fingerprint import fingerprint
    from ryzen_compile.ir.interface_metadata import interface_of
    from ryzen_compile.ir.text_files import recorded_text_files

    interface = interface_of(model)
    return GraphSummary(
        fingerprint=fingerprint(model),
        interface=interface,
        node_names_digest=_digest_node_names(model),
        metadata_digest=_digest_metadata(model),
        half_precision=half_precision_of(model),
        contents=graph_contents(model),
        text_files=recorded_text_files(model),
        branch_values=tuple(combinations_of(find_control_values(model, interface, loops=False))),
    )


def _digest_node_names(model: ir.Model) -> str:
    import blake3

    named_nodes = [(node.name or "", node.domain, node.op_type) for node in model.graph.all_nodes()]
    return blake3.blake3(msgspec.json.encode(named_nodes)).hexdigest()[:16]


def _digest_metadata(model: ir.Model) -> str:
    """Return the digest of what a variant keeps of a file beside its graph: properties and the version of the format."""
    import blake3

    from ryzen_compile.ir.interface_metadata import METADATA_KEY

    properties = sorted((key, value) for key, value in model.metadata_props.items() if key != METADATA_KEY)
    return blake3.blake3(msgspec.json.encode([model.ir_version, properties])).hexdigest()[:16]


def half_precision_of(model: ir.Model) -> HalfPrecision | None:
    """Return the half-precision type of inputs, outputs, weights and values, or None.

    If both types occur, return the one with fewer mantissa bits, bf16.
    """
    import onnx_ir as ir

    values = [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]
    dtypes = {value.dtype for value in values}
    for node in model.graph.all_nodes():
        dtypes.update(output.dtype for output in node.outputs)
        if node.op_type == "Cast":
            dtypes.add(ir.DataType(node.attributes.get_int("to", 0)))
    return "bf16" if ir.DataType.BFLOAT16 in dtypes else "fp16" if ir.DataType.FLOAT16 in dtypes else None
