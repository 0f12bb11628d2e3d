"""What is evaluated: a package or an ONNX file, opened on this machine, and what its metadata says of its caches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ryzen_compile import registry
from ryzen_compile.artifacts.package.read import Package, read_package
from ryzen_compile.errors import ModelError, RyzenError
from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.ir.load import load as load_graph
from ryzen_compile.numerics.candidate import processor_name
from ryzen_compile.runtime.choose import EngineChoice
from ryzen_compile.runtime.generation.decoder_spec import make_decoder_spec
from ryzen_compile.runtime.generation.step_graphs import StepGraph
from ryzen_compile.runtime.load import Engine, load
from ryzen_compile.spec import profile
from ryzen_compile.spec.kv_cache import KVCacheSpec, read_kv_cache_spec

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from ryzen_compile.spec.interface import Interface


@dataclass(frozen=True, kw_only=True)
class EvaluatedDecoder:
    """A decoder that is ready to run."""

    engine: Engine
    cache_spec: KVCacheSpec
    """What each layer keeps."""
    single_token: bool
    """Whether steps of one token are run by a graph that takes nothing else."""
    machine: str
    """The processor or GPU that runs it."""
    package: Package | None
    """Where it comes from; None for an ONNX file."""
    variant_path: str | None
    """The path of the variant in the package that runs, or that the engine which runs was built from."""

    @property
    def method_summary(self) -> str | None:
        """What its caches lose, in words; None where they lose nothing."""
        words = []
        if layers := [layer for layer in self.cache_spec.layers if layer.method != "all"]:
            slots = sorted({layer.slots or 0 for layer in layers})
            kept = str(slots[0]) if len(slots) == 1 else f"{slots[0]} to {slots[-1]}"
            words.append(f"{', '.join(dict.fromkeys(layer.method for layer in layers))}, {kept} tokens a head")
        if not self.cache_spec.is_unquantized:
            sides = {
                "keys": [layer.key for layer in self.cache_spec.layers],
                "values": [layer.value for layer in self.cache_spec.layers],
            }
            words += [
                f"{name} as {', '.join(sorted({side.storage_type or side.dtype for side in some}))}"
                for name, some in sides.items()
            ]
        return "; ".join(words) or None

    def torch_reference(self, module: torch.nn.Module) -> Callable[[], Any] | None:
        """Return what makes caches for transformers' `module` that keep the same; None where no pass knows how.

        Raises ModelError where the pass that made the caches says why it cannot.
        """
        for name in registry.names("passes"):
            make = registry.find_pass(name).torch_reference(self.cache_spec, single_token=self.single_token, module=module)
            if make is not None:
                return make
        return None


@contextmanager
def open_decoder(path: str | os.PathLike[str], *, graph: str | None, backend: str | None) -> Iterator[EvaluatedDecoder]:
    """Make the decoder at `path` ready; raises RyzenError for what is none, or is there in no form that runs here."""
    place = Path(path)
    if place.is_dir():
        with load(place, graph=graph, backend=backend) as engine:
            yield _from_package(engine, read_package(place), graph)
    elif place.is_file():
        with _open_onnx(place) as subject:
            yield subject
    else:
        raise RyzenError(f"there is no package or model `{path}`", hint="give a .ryzen folder or an .onnx file")


def _from_package(engine: Engine, package: Package, graph: str | None) -> EvaluatedDecoder:
    manifest, chosen = package.manifest, engine.choice.path
    built = {one.path: (one.graph, one.variant) for one in manifest.engines}
    found = next(
        variant
        for one in manifest.graphs
        for variant in one.variants
        if variant.path == chosen or (one.name, variant.name) == built.get(chosen)
    )
    package.verify_digests(found.path, *found.weights)
    graphs = [one for one in manifest.graphs if graph in (None, one.name)]
    return EvaluatedDecoder(
        engine=engine,
        cache_spec=_read_cache_spec(load_graph(package.path / found.path), str(package.path)),
        single_token=_has_single_token_graph([one.interface for one in graphs]),
        machine=processor_name() if engine.choice.backend == "onnxruntime" else engine.choice.summary.rpartition(" on ")[2],
        package=package,
        variant_path=found.path,
    )


@contextmanager
def _open_onnx(path: Path) -> Iterator[EvaluatedDecoder]:
    model = load_graph(path)
    interface = interface_of(model)
    make_decoder_spec(interface)
    told, says = _read_cache_spec(model, str(path)), f"{path.name} by onnxruntime"
    with ExitStack() as resources:
        session = resources.enter_context(registry.find_backend("onnxruntime").open(str(path)))
        choice = EngineChoice(backend="onnxruntime", path=path.name, files=(), summary=says, rejected=())
        part = StepGraph(session=session, interface=interface, profiles=(profile.derive_profile(interface),))
        with Engine((part,), choice=choice, resources=resources.pop_all(), load_seconds=0.0) as engine:
            yield EvaluatedDecoder(
                engine=engine,
                cache_spec=told,
                single_token=_has_single_token_graph([interface]),
                machine=processor_name(),
                package=None,
                variant_path=None,
            )


def _read_cache_spec(model: ir.Model, name: str) -> KVCacheSpec:
    told = read_kv_cache_spec(model)
    if told is None or not told.is_static:
        raise ModelError(
            f"`{name}` does not tell what its caches keep",
            hint="evaluate what `ryzen-compile rewrite MODEL.onnx OUT.onnx --passes kv-static{capacity=4096}` writes",
        )
    return told


def _has_single_token_graph(interfaces: Sequence[Interface]) -> bool:
    return any((make_decoder_spec(one).ids.dims or ())[1:] == (1,) for one in interfaces)
