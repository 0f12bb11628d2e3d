"""Tests of cache keys after a change of code: a changed pass, core module or recipe is a cache miss."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import onnx
import pytest
from support import tiny_models

import ryzen_compile
from ryzen_compile.builder import cache_keys, default_pipelines
from ryzen_compile.builder.build import build
from ryzen_compile.builder.config import BuildConfig
from ryzen_compile.builder.default_pipelines import VariantPipeline, pipeline_for
from ryzen_compile.builder.sources import GraphSummary, SourceGraph
from ryzen_compile.builder.target_assignment import TargetGroup
from ryzen_compile.spec.interface import Interface
from ryzen_compile.spec.legalization_pass import GraphContents
from ryzen_compile.spec.target import OS, Target
from ryzen_compile.utils import source_digest

CHANGES = {
    "ryzen_passes/fold/simplify.py": {"package", "variant"},
    "ryzen_compile/ir/save.py": {"package", "variant", "engine", "comparison", "summary"},
    "ryzen_compile/spec/products.toml": {"package", "variant", "engine", "comparison", "summary"},
    "ryzen_compile/numerics/metrics.py": {"package", "comparison"},
    "ryzen_compile/cli/commands/inspect.py": set(),
    "ryzen_models/_decoders.py": {"samples"},
    "ryzen_models/tinylm/weights.safetensors": {"samples"},
    "ryzen_models/resnet.py": set(),
}
"""The keys that change with a source file."""

SUMMARY = GraphSummary(
    fingerprint="f",
    interface=Interface(inputs=(), outputs=()),
    half_precision=None,
    contents=GraphContents(),
    node_names_digest="n",
    metadata_digest="m",
)

SCRIPT = """
import json, sys
import msgspec
from ryzen_compile.builder import cache_keys, code_key
from ryzen_compile.builder.default_pipelines import pipeline_for
from ryzen_compile.builder.sources import GraphSummary, SourceGraph, SummaryKey
from ryzen_compile.builder.target_assignment import TargetGroup
from ryzen_compile.data.loading import samples_digest
from ryzen_compile.numerics.criteria import default_criteria
from ryzen_compile.spec.target import parse_target
from ryzen_compile.utils.source_digest import module_digest, package_digest

source = SourceGraph(name="model", path="m.onnx", summary=msgspec.json.decode(sys.argv[1], type=GraphSummary))
pipeline = pipeline_for("tensorrt-rtx", passes="fold", precision=None, source_half_precision=None)
group = TargetGroup(backend="tensorrt-rtx", version="1", targets=(parse_target("sm89"),))

def keys():
    package_digest.cache_clear()  # the digests are computed once per process
    module_digest.cache_clear()
    pipelines, no_profiles = {"model": [pipeline]}, {"model": ()}
    return {
        "package": cache_keys.package_key(
            [source], pipelines, no_profiles, [], [], {}, samples_digest="", comparison=None
        ).cache_key.digest,
        "variant": cache_keys.variant_key(
            source, pipeline, [], (), samples_digest="", seed=0, saves_checkpoints=False
        ).cache_key.digest,
        "engine": cache_keys.engine_key("sha256", (), group, {}).cache_key.digest,
        "comparison": cache_keys.comparison_key(
            candidate="a", candidate_name="a", baseline="b", baseline_name="b", torch_passes=None,
            interface=source.summary.interface, profiles=(), samples="", criteria=default_criteria(), machine="",
        ).cache_key.digest,
        "summary": SummaryKey(code=code_key.code_key(), file="f").cache_key.digest,
        "samples": samples_digest("recipe:tinylm", [], seed=0),
    }

before, changed = keys(), {}
assert keys() == before
for path in sys.argv[2:]:
    with open(path, "a") as file:
        file.write("\\n# changed\\n")
    after = keys()
    changed[path] = [name for name in before if before[name] != after[name]]
    before = after
print(json.dumps(changed))
"""


def test_a_change_of_code_changes_the_keys_of_what_it_produces(tmp_path: Path) -> None:
    import ryzen_models
    import ryzen_passes

    for package in (ryzen_compile, ryzen_passes, ryzen_models):
        folder = Path(package.__path__[0])
        shutil.copytree(folder, tmp_path / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, msgspec.json.encode(SUMMARY).decode(), *CHANGES],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert {path: set(keys) for path, keys in json.loads(result.stdout).items()} == CHANGES


def append_comment(path: Path) -> None:
    with path.open("a") as file:
        file.write("\n# changed\n")


@pytest.fixture
def external_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Write a package outside of the project with one pass, which uses a helper module."""
    folder = tmp_path / "external_passes"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "helper.py").write_text("OP = 'Relu'\n")
    (folder / "prune.py").write_text(
        "from dataclasses import dataclass\n"
        "from typing import ClassVar\n"
        "from ryzen_compile.spec.passes import Change, Pass, PassEstimate\n"
        "from external_passes.helper import OP\n\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Prune(Pass):\n"
        "    name: ClassVar[str] = 'prune'\n"
        "    def estimate(self, model, context): return PassEstimate()\n"
        "    def rewrite(self, model, context): return Change(summary='nothing to prune')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "external_passes"]:
        del sys.modules[name]


def test_the_key_covers_the_package_of_an_external_pass(external_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    prune = importlib.import_module("external_passes.prune").Prune()
    monkeypatch.setattr(default_pipelines.parser, "parse", lambda text: (prune,))
    pipeline = pipeline_for("tensorrt-rtx", passes="prune", precision=None, source_half_precision=None)
    before = variant_parts(pipeline)
    assert "code.packages.external_passes" in before
    append_comment(external_package / "helper.py")
    assert variant_parts(pipeline) == before, "the digest is computed once per process"
    source_digest.package_digest.cache_clear()
    after = variant_parts(pipeline)
    assert {name for name in before if before[name] != after[name]} == {"code.packages.external_passes"}


def variant_parts(pipeline: VariantPipeline) -> Mapping[str, str]:
    source = SourceGraph(name="model", path="m.onnx", summary=SUMMARY)
    return cache_keys.variant_key(source, pipeline, [], (), samples_digest="", seed=0, saves_checkpoints=False).cache_key.parts


def test_the_key_of_an_engine_contains_the_operating_system() -> None:
    def engine_parts(os_: OS) -> Mapping[str, str]:
        group = TargetGroup(backend="tensorrt-rtx", version="1", targets=(Target(name="sm89", sm=89, os=os_),))
        return cache_keys.engine_key("sha256", (), group, {}).cache_key.parts

    linux, windows = engine_parts("linux"), engine_parts("windows")
    assert {name for name in linux if linux[name] != windows[name]} == {"os"}


def test_a_graph_that_differs_in_its_metadata_only_is_not_taken_from_the_cache(tmp_path: Path) -> None:
    def built_metadata(value: str) -> Mapping[str, str]:
        model = tiny_models.model()
        onnx.helper.set_model_props(model, {"revision": value})
        onnx.save(model, tmp_path / "small.onnx")
        config = BuildConfig(gpu="cpu", compare=False)
        package = build(tmp_path / "small.onnx", tmp_path / f"{value}.ryzen", config=config, cache=tmp_path / "cache")
        (variant,) = package.manifest.graphs[0].variants
        return {prop.key: prop.value for prop in onnx.load(package.path / variant.path).metadata_props}

    assert built_metadata("old")["revision"] == "old"
    assert built_metadata("new")["revision"] == "new"
