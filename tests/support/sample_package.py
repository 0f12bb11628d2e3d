"""A small valid package, built without a model."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import onnx

from ryzen_compile.artifacts.package import layout
from ryzen_compile.artifacts.package.manifest import AccuracyRecord, EngineRecord, GraphRecord, Manifest, VariantRecord
from ryzen_compile.artifacts.package.read import Package
from ryzen_compile.artifacts.package.write import Staging
from ryzen_compile.spec.interface import InputSpec, Interface, TensorSpec
from ryzen_compile.spec.profile import Profile
from ryzen_compile.spec.target import Target
from ryzen_compile.utils.files import hash_file

VARIANT = "fold"
ENGINE_PATH = layout.engine_path("model", VARIANT, "tensorrt-rtx", ("sm86", "sm89"))
GRAPH_PATH = layout.graph_path("model", VARIANT)


def manifest(*, weights: tuple[str, ...] = (), name: str = "toy") -> Manifest:
    """Return a manifest of one graph with a variant for each of two backends and one engine.

    `files` is empty, as `Staging.commit` sets it.
    """
    interface = Interface(
        inputs=(InputSpec(name="x", dtype="float32", dims=(1, 4), low=0),),
        outputs=(TensorSpec(name="y", dtype="float32", dims=(1, 4)),),
    )
    profile = Profile(min={"x": (1, 4)}, opt={"x": (1, 4)}, max={"x": (1, 4)})
    portable = VariantRecord(
        name=VARIANT, path=GRAPH_PATH, backend="onnxruntime", precision="fp32", portable=True, weights=weights, passes=()
    )
    compiled = msgspec.structs.replace(portable, backend="tensorrt-rtx", portable=False, portable_form=VARIANT)
    engine = EngineRecord(
        path=ENGINE_PATH,
        backend="tensorrt-rtx",
        backend_version="1.7",
        targets=(Target(name="sm86", sm=86), Target(name="sm89", sm=89)),
        graph="model",
        variant=VARIANT,
        profiles=(profile,),
        options={"builderOptimizationLevel": 3},
        seconds=1.5,
        layers=None,
        warnings=(),
        provenance=(),
    )
    graph = GraphRecord(
        name="model",
        interface=interface,
        profiles=(profile,),
        fingerprint="f",
        source_file="toy.onnx",
        variants=(portable, compiled),
    )
    return Manifest(
        schema_version=2,
        name=name,
        key="k",
        key_parts={"graph model": "f"},
        graphs=(graph,),
        engines=(engine,),
        refused_targets=(),
        files=(),
        created_by="ryzen-compile 0",
        created_at="2026-01-01T00:00:00+00:00",
        seconds=2.0,
    )


def with_unmet_criteria(manifest: Manifest, path: str) -> Manifest:
    """Return a manifest in which the variant at `path` does not meet its criteria."""
    unmet = AccuracyRecord(
        candidate="candidate",
        baseline="source",
        machine="machine",
        cases=1,
        criteria="strict.toml",
        metrics=(),
        met=False,
        timestamp="now",
    )
    graphs = tuple(
        msgspec.structs.replace(
            graph,
            variants=tuple(
                msgspec.structs.replace(variant, accuracy=(*variant.accuracy, unmet)) if variant.path == path else variant
                for variant in graph.variants
            ),
        )
        for graph in manifest.graphs
    )
    return msgspec.structs.replace(manifest, graphs=graphs)


def graph_bytes(location: str, size: int, *, doc_string: str = "") -> bytes:
    """Return an ONNX file with one external weight of `size` bytes at `location`; `doc_string` increases the file's size."""
    weight = onnx.TensorProto(name="w", dims=[size], data_type=onnx.TensorProto.INT8, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", str(size))):
        weight.external_data.add(key=key, value=value)
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT8, [size])
    body = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["w"], ["y"])], "toy", [], [output], [weight])
    model = onnx.helper.make_model(body, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10, doc_string=doc_string)
    data: bytes = model.SerializeToString()
    return data


def write_files(staging: Staging, *, size: int = 3000, seed: bytes = b"a") -> Manifest:
    """Write the files of the package to `staging`, each of `size` bytes or slightly more, and return the manifest."""
    weights = staging.folder / "weights.new"
    weights.write_bytes(seed * size)
    digest = hash_file(weights, "sha256")
    os.rename(weights, staging.path(layout.weight_path(digest)))
    staging.path(GRAPH_PATH).write_bytes(graph_bytes(f"weights/{digest}", size, doc_string=(seed * size).decode("latin-1")))
    staging.path(ENGINE_PATH).write_bytes(b"engine" + seed * size)
    staging.path("reports/accuracy.json").write_bytes(b"{}")
    return manifest(weights=(layout.weight_path(digest),), name=seed.decode())


def make_package(path: Path, *, size: int = 3000, seed: bytes = b"a") -> Package:
    """Write the package to `path`."""
    with Staging(path) as staging:
        return staging.commit(write_files(staging, size=size, seed=seed))
