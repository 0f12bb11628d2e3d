"""The decoder under evaluation: a package or an ONNX file opened on this machine, with its KV cache specification."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ryzen_compile import registry
from ryzen_compile.artifacts.package.read import Package, read_package
from ryzen_compile.artifacts.package.reference import parse_load_request
from ryzen_compile.errors import ModelError, RyzenError
from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.ir.load import load as load_graph
from ryzen_compile.runtime.generation.decoder_spec import make_decoder_spec
from ryzen_compile.runtime.load import Engine, load
from ryzen_compile.spec.kv_cache import KVCacheSpec, read_kv_cache_spec
from ryzen_compile.spec.pass_abilities import KVCacheReference
from ryzen_compile.utils.machine import processor_name

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from ryzen_compile.spec.interface import Interface


@dataclass(frozen=True, kw_only=True)
class EvaluatedDecoder:
    """A decoder that is open and ready to run."""

    engine: Engine
    cache_spec: KVCacheSpec
    """What each layer keeps."""
    single_token: bool
    """Whether a graph that takes only single tokens runs the steps of one token."""
    machine: str
    """The processor or GPU that runs it."""
    variant_path: str | None
    """The path in the package of the variant that runs, or from which the running engine was built."""
    folder: Path
    """The folder that contains the package or the ONNX file."""

    @property
    def method_summary(self) -> str | None:
        """A summary of the lossy KV methods; None if the caches are lossless."""
        parts = []
        layers = self.cache_spec.layers
        if methods := list(dict.fromkeys(layer.method for layer in layers if layer.method is not None)):
            slots = sorted({layer.policy.slots or 0 for layer in layers if layer.method is not None})
            slot_range = str(slots[0]) if len(slots) == 1 else f"{slots[0]} to {slots[-1]}"
            parts.append(f"{', '.join(methods)}, {slot_range} tokens per head")
        if not self.cache_spec.is_unquantized:
            tensors = {
                "keys": [layer.key for layer in self.cache_spec.layers],
                "values": [layer.value for layer in self.cache_spec.layers],
            }
            parts += [
                f"{name} as {', '.join(sorted({spec.storage_name for spec in specs}))}" for name, specs in tensors.items()
            ]
        return "; ".join(parts) or None

    def torch_cache_factory(self, module: torch.nn.Module, statistics: Sequence[Path]) -> Callable[[], Any] | None:
        """Return a factory for Transformers caches of `module` that follow the same method; None if no pass has one.

        `statistics` are as in `KVCacheReference`; the folder of the decoder is searched too. Raises ModelError if the pass
        that created the caches cannot provide it.
        """
        for name in registry.names("passes"):
            pass_class = registry.find_pass(name)
            if not issubclass(pass_class, KVCacheReference):
                continue
            make_cache = pass_class.torch_cache_factory(
                self.cache_spec, single_token=self.single_token, module=module, statistics=(*statistics, self.folder)
            )
            if make_cache is not None:
                return make_cache
        return None


@contextmanager
def open_decoder(
    reference: str | os.PathLike[str], *, graph: str | None, variant: str | None, backend: str | None
) -> Iterator[EvaluatedDecoder]:
    """Open the decoder that `reference` names: a package, with #GRAPH and @VARIANT, or an ONNX file.

    `graph`, `variant` and `backend` are as in `load`. Raises RyzenError if it is not a decoder with static caches or cannot
    run here.
    """
    request = parse_load_request(str(reference), graph=graph, variant=variant, backend=backend)
    if request.path.is_dir():
        with load(request.path, graph=request.graph, variant=request.variant, backend=request.backend) as engine:
            yield _from_package(engine, read_package(request.path), request.graph)
    elif Path(reference).is_file():
        with _open_onnx(Path(reference)) as decoder:
            yield decoder
    else:
        raise RyzenError(f"there is no package or model `{reference}`", hint="give a .ryzen folder or an .onnx file")


def _from_package(engine: Engine, package: Package, graph: str | None) -> EvaluatedDecoder:
    manifest, path = package.manifest, engine.choice.path
    _, variant = manifest.variant_at(path)
    package.verify_digests(variant.path, *variant.weights)
    graphs = [record for record in manifest.graphs if graph in (None, record.name)]
    return EvaluatedDecoder(
        engine=engine,
        cache_spec=_read_cache_spec(load_graph(package.path / variant.path), str(package.path)),
        single_token=_has_single_token_graph([record.interface for record in graphs]),
        machine=engine.choice.gpu or processor_name(),
        variant_path=variant.path,
        folder=package.path.resolve().parent,
    )


@contextmanager
def _open_onnx(path: Path) -> Iterator[EvaluatedDecoder]:
    model = load_graph(path)
    interface = interface_of(model)
    make_decoder_spec(interface)
    cache_spec = _read_cache_spec(model, str(path))
    with load(path) as engine:
        yield EvaluatedDecoder(
            engine=engine,
            cache_spec=cache_spec,
            single_token=_has_single_token_graph([interface]),
            machine=processor_name(),
            variant_path=None,
            folder=path.resolve().parent,
        )


def _read_cache_spec(model: ir.Model, name: str) -> KVCacheSpec:
    spec = read_kv_cache_spec(model)
    if spec is None or not spec.is_static:
        raise ModelError(
            f"`{name}` has no specification of static KV caches in its metadata",
            hint="evaluate the output of `ryzen-compile rewrite MODEL.onnx OUT.onnx --passes kv-static{capacity=4096}`",
        )
    return spec


def _has_single_token_graph(interfaces: Sequence[Interface]) -> bool:
    return any((make_decoder_spec(interface).ids.dims or ())[1:] == (1,) for interface in interfaces)
