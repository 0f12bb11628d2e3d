"""References to parts of a package: `model.ryzen#GRAPH@VARIANT`, and the lookup of variants by name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ryzen_compile import registry
from ryzen_compile.artifacts.package.layout import MANIFEST_NAME
from ryzen_compile.artifacts.package.read import read_manifest
from ryzen_compile.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from ryzen_compile.artifacts.package.manifest import EngineRecord, GraphRecord, Manifest, VariantRecord


@dataclass(frozen=True, kw_only=True)
class PackageReference:
    """A package, and optionally a graph of it and a selector of variants or engines of the graph."""

    path: Path
    graph: str | None = None
    selector: str | None = None
    """What follows the first `@` after the graph: `VARIANT`, `VARIANT@BACKEND`, `BACKEND`, or a file of the package."""


@dataclass(frozen=True, kw_only=True)
class LoadRequest:
    """What to load from a package: the arguments of `runtime.load.load`."""

    path: Path
    graph: str | None = None
    variant: str | None = None
    backend: str | None = None


def parse_package_reference(text: str) -> PackageReference:
    """Split `model.ryzen#graph@selector`; a missing part is None.

    The path is the longest prefix that exists and ends before a `#` or `@`; if none exists, it ends at the first `#` or `@`.
    """
    positions = [at for at, char in enumerate(text) if char in "#@"] + [len(text)]
    end = next((at for at in reversed(positions) if Path(text[:at]).exists()), positions[0])
    graph, at_sign, selector = text[end:].partition("@")
    return PackageReference(path=Path(text[:end]), graph=graph[1:] or None, selector=selector if at_sign else None)


def split_selector(selector: str) -> tuple[str | None, str | None]:
    """Split `VARIANT`, `VARIANT@BACKEND` or `BACKEND` into variant and backend; a missing part is None."""
    variant, at_sign, backend = selector.partition("@")
    if at_sign:
        return variant, backend
    return (None, selector) if selector in registry.names("backends") else (selector, None)


def parse_load_request(
    text: str, *, graph: str | None = None, variant: str | None = None, backend: str | None = None
) -> LoadRequest:
    """Return what `text` refers to, `model.ryzen#GRAPH@VARIANT@BACKEND`, together with the values of options.

    Raises UsageError if the text and an option name different things.
    """
    reference = parse_package_reference(text)
    named_variant, named_backend = (None, None) if reference.selector is None else split_selector(reference.selector)
    return LoadRequest(
        path=reference.path,
        graph=_either(text, "graph", reference.graph, graph),
        variant=_either(text, "variant", named_variant, variant),
        backend=_either(text, "backend", named_backend, backend),
    )


def _either(text: str, kind: str, named: str | None, option: str | None) -> str | None:
    if named is not None and option is not None and named != option:
        raise UsageError(f"`{text}` names the {kind} `{named}`, and --{kind} names `{option}`", hint="name it once")
    return option if named is None else named


def find_graph(manifest: Manifest, name: str | None) -> GraphRecord:
    """Return the graph called `name`, or the only graph. Raises UsageError if there is none or `name` is required."""
    names = [graph.name for graph in manifest.graphs]
    if name is None and len(names) == 1:
        return manifest.graphs[0]
    if name is None:
        raise UsageError("this package contains several graphs", hint=f"name one of {', '.join(names)}")
    if name not in names:
        raise UsageError(f"this package contains no graph `{name}`", hint=did_you_mean(name, names))
    return manifest.graph(name)


def matching_name(names: Iterable[str], text: str) -> str | None:
    """Return the name that is `text`, or the only one that begins with it; None if there is none.

    Raises UsageError if several names begin with `text`.
    """
    distinct = list(dict.fromkeys(names))
    if text in distinct:
        return text
    matches = [name for name in distinct if text and name.startswith(text)]
    if len(matches) > 1:
        raise UsageError(f"several variants begin with `{text}`", hint=f"name one of {', '.join(matches)}")
    return matches[0] if matches else None


def find_variant_name(graph: GraphRecord, text: str) -> str:
    """Return the name of the variant of `graph` that is `text` or begins with it.

    Raises UsageError if there is none, or if several names begin with `text`.
    """
    names = [variant.name for variant in graph.variants]
    name = matching_name(names, text)
    if name is None:
        raise UsageError(f"graph `{graph.name}` has no variant `{text}`", hint=did_you_mean(text, list(dict.fromkeys(names))))
    return name


def default_variant(variants: Sequence[VariantRecord], backend: str) -> VariantRecord | None:
    """Return the default among `variants` for `backend`, which is the first; None if there is none."""
    return next((variant for variant in variants if variant.backend == backend), None)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The selected variants and engines of one graph."""

    graph: GraphRecord
    variants: Sequence[VariantRecord]
    engines: Sequence[EngineRecord]


def select(manifest: Manifest, reference: PackageReference) -> tuple[Selection, ...]:
    """Return what `reference` selects, for each graph of which it selects something.

    Without a selector, all variants and engines are selected. A selector is

    * `VARIANT` or `VARIANT@BACKEND`: a variant, and the engines compiled from it. The name may be a beginning that no other
      variant has;
    * `BACKEND`: the engines of a backend; of the portable backend, the variants that it runs;
    * a file: the name or path of a graph or an engine.

    Raises UsageError if nothing is selected, or if several variants begin with the name.
    """
    graphs = manifest.graphs if reference.graph is None else (find_graph(manifest, reference.graph),)
    selections = [_select_of_graph(manifest, graph, reference.selector) for graph in graphs]
    selected = tuple(selection for selection in selections if selection.variants or selection.engines)
    if not selected:
        names = [variant.name for graph in graphs for variant in graph.variants]
        names += [name for engine in manifest.engines for name in (engine.backend, Path(engine.path).name)]
        raise UsageError(
            f"`{reference.path}` contains no variant or engine `{reference.selector}`",
            hint=did_you_mean(reference.selector or "", list(dict.fromkeys(names))),
        )
    return selected


def restrict(manifest: Manifest, reference: PackageReference) -> Manifest:
    """Return `manifest` with the graphs, variants, engines and refused targets that `reference` selects.

    Raises as `select` does.
    """
    selections = {selection.graph.name: selection for selection in select(manifest, reference)}
    names = {(graph, variant.name) for graph, selection in selections.items() for variant in selection.variants}
    return msgspec.structs.replace(
        manifest,
        graphs=tuple(
            msgspec.structs.replace(selection.graph, variants=tuple(selection.variants)) for selection in selections.values()
        ),
        engines=tuple(engine for selection in selections.values() for engine in selection.engines),
        refused_targets=tuple(
            refused
            for refused in manifest.refused_targets
            if refused.graph in selections and (reference.selector is None or (refused.graph, refused.variant) in names)
        ),
    )


def _select_of_graph(manifest: Manifest, graph: GraphRecord, selector: str | None) -> Selection:
    variants: Sequence[VariantRecord] = graph.variants
    engines = [engine for engine in manifest.engines if engine.graph == graph.name]
    if selector is None:
        return Selection(graph=graph, variants=variants, engines=engines)
    by_file = Selection(
        graph=graph,
        variants=[variant for variant in variants if _is_file(selector, variant.path)],
        engines=[engine for engine in engines if _is_file(selector, engine.path)],
    )
    if by_file.variants or by_file.engines:
        return by_file
    text, backend = split_selector(selector)
    variants = [variant for variant in variants if backend in (None, variant.backend)]
    engines = [engine for engine in engines if backend in (None, engine.backend)]
    if text is None:
        return Selection(graph=graph, variants=[variant for variant in variants if variant.portable], engines=engines)
    name = matching_name((variant.name for variant in variants), text)
    return Selection(
        graph=graph,
        variants=[variant for variant in variants if variant.name == name],
        engines=[engine for engine in engines if engine.variant == name],
    )


def _is_file(selector: str, path: str) -> bool:
    return selector in (path, Path(path).name, Path(path).stem)


def input_digests(*paths: Path) -> dict[str, str]:
    """Return {path: digest} of packages and ONNX files; a path that does not exist is left out.

    The digest of a package is that of its manifest, which contains the digests of all files. Raises ModelError for a file that
    is not an ONNX file, and PackageError for a manifest that cannot be read or is too large.
    """
    from ryzen_compile.ir.fingerprint import file_digest_hex

    digests = {}
    for path in paths:
        if path.is_dir() and (path / MANIFEST_NAME).is_file():
            digests[str(path)] = hashlib.sha256(read_manifest(path)).hexdigest()
        elif path.is_file():
            digests[str(path)] = file_digest_hex(path)
    return digests
