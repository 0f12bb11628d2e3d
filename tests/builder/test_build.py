"""Tests of builds: contents of packages, caching, refusals and failures."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from support import tiny_models
from support.cache_entries import RecordingProgress
from support.faulty_builder import FaultyBackend

import ryzen_compile as rc
from ryzen_compile.artifacts.cache.maintenance import list_entries
from ryzen_compile.artifacts.cache.store import Store
from ryzen_compile.artifacts.package.read import read_package
from ryzen_compile.backends.process.worker import Worker
from ryzen_compile.builder import engine_builder
from ryzen_compile.diagnostic import Diagnostic
from ryzen_compile.errors import AccuracyError, BackendError, ModelError, UsageError
from ryzen_compile.ir.load import load
from ryzen_compile.ir.save import save
from ryzen_compile.ir.text_files import write_text_files
from ryzen_compile.progress import SilentProgress


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_models.write(tmp_path / "small.onnx")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_a_build_for_cpu_and_gpus_holds_graphs_engines_and_provenance(source: Path, cache: Path) -> None:
    package = rc.build(source, gpu="cpu,sm86,sm89,sm120", precision="fp16", cache=cache)
    (graph,) = package.manifest.graphs
    (engine,) = package.manifest.engines
    assert package.path == source.with_suffix(".ryzen")
    assert {variant.name: variant.precision for variant in graph.variants} == {
        "fold+attention+precision.to-fp16": "fp16",
        "fold": "fp32",
    }
    assert [str(target) for target in engine.targets] == ["sm86", "sm89", "sm120"]
    assert [entry.level for entry in engine.provenance] == ["built"]
    assert engine.layers is not None
    assert engine.layers.dtype_fraction("float16") > 0.5
    for variant in graph.variants:
        assert variant.portable == (variant.precision == "fp32")
        (accuracy,) = variant.accuracy
        assert accuracy.met, accuracy
        assert accuracy.cases >= 3
    read_package(package.path).check()


def test_a_loaded_package_computes_the_function_of_the_model(source: Path, cache: Path) -> None:
    package = rc.build(source, gpu="cpu", cache=cache)
    x = np.random.default_rng(1).standard_normal((5, tiny_models.WIDTH)).astype(np.float32)
    with rc.load(package.path) as engine:
        np.testing.assert_allclose(engine(x=x), tiny_models.expected(x), rtol=1e-5, atol=1e-5)


def test_an_identical_second_build_comes_from_the_cache(source: Path, cache: Path, tmp_path: Path) -> None:
    first = rc.build(source, tmp_path / "one.ryzen", gpu="cpu,sm89", compare=False, cache=cache)
    second = rc.build(source, tmp_path / "two.ryzen", gpu="cpu,sm89", compare=False, cache=cache)
    assert second.manifest.created_at == first.manifest.created_at
    assert second.manifest.seconds == first.manifest.seconds
    assert {file.path: file.sha256 for file in second.manifest.files} == {
        file.path: file.sha256 for file in first.manifest.files
    }
    second.check()


def write_with_tokenizer(path: Path, content: bytes) -> Path:
    tiny_models.write(path)
    model = load(path)
    write_text_files(model, path, {"tokenizer.json": content}, folder=f"{path.stem}.text")
    save(model, path)
    return path


def test_a_tokenizer_that_no_package_can_hold_is_refused_before_any_work(tmp_path: Path, cache: Path) -> None:
    files = {name: write_with_tokenizer(tmp_path / f"{name}.onnx", name.encode()) for name in ("a", "b")}
    with pytest.raises(UsageError, match="`a` and `b` have different tokenizers"):
        rc.build(files, tmp_path / "m.ryzen", gpu="cpu", cache=cache)
    (tmp_path / "a.text" / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="needs its tokenizer file"):
        rc.build(files["a"], gpu="cpu", cache=cache)
    assert {entry.kind for entry in list_entries(Store(cache))} == {"summary"}


def test_a_build_of_cached_variants_does_not_load_its_source(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_with_tokenizer(tmp_path / "a.onnx", b"a")
    rc.build(source, gpu="cpu", compare=False, cache=cache)
    monkeypatch.delattr("ryzen_compile.ir.load.load")
    package = rc.build(source, gpu="cpu", cache=cache)
    assert package.manifest.graphs[0].variants[0].accuracy
    assert [(package.path / path).read_bytes() for path in package.manifest.text_files] == [b"a"]


@pytest.mark.parametrize(
    "change",
    [
        {"gpu": "cpu,sm86"},
        {"gpu": "cpu,sm89", "precision": "fp16"},
        {"gpu": "cpu,sm89", "passes": "fold"},
        {"gpu": "cpu,sm89", "opt_shapes": ["x:2x16"]},
        {"gpu": "cpu,sm89", "options": {"builderOptimizationLevel": "1"}},
        {"gpu": "cpu,sm89", "compare": True},
    ],
)
def test_a_change_of_configuration_misses_the_cache(source: Path, cache: Path, change: dict[str, object]) -> None:
    rc.build(source, gpu="cpu,sm89", compare=False, cache=cache)
    config_fields = {"compare": False} | change
    keys = {
        rc.build(source, cache=cache, **config_fields).manifest.key,
        rc.build(source, gpu="cpu,sm89", compare=False, cache=cache).manifest.key,
    }  # type: ignore[arg-type]
    assert len(keys) == 2


def test_other_weights_miss_the_cache_and_another_file_name_does_not(tmp_path: Path, cache: Path) -> None:
    first = rc.build(tiny_models.write(tmp_path / "a.onnx"), gpu="cpu", compare=False, cache=cache)
    renamed = rc.build(tiny_models.write(tmp_path / "b.onnx"), gpu="cpu", compare=False, cache=cache)
    other = rc.build(tiny_models.write(tmp_path / "c.onnx", seed=1), gpu="cpu", compare=False, cache=cache)
    assert renamed.manifest.key == first.manifest.key
    assert other.manifest.key != first.manifest.key


def test_a_build_for_another_target_reuses_the_cached_engine(source: Path, cache: Path, tmp_path: Path) -> None:
    first = rc.build(source, tmp_path / "one.ryzen", gpu="sm89", compare=False, cache=cache)
    second = rc.build(source, tmp_path / "two.ryzen", gpu="cpu,sm89", compare=False, cache=cache)
    assert second.manifest.key != first.manifest.key
    assert second.manifest.engines[0].seconds == first.manifest.engines[0].seconds
    path = second.manifest.engines[0].path
    assert second.file(path).sha256 == first.file(path).sha256, "engines are not reproducible, so equal bytes mean reuse"


def test_a_refused_target_is_recorded_and_the_others_are_built(source: Path, cache: Path) -> None:
    with pytest.raises(BackendError, match="h200: refused by tensorrt for `model`"):
        rc.build(source, gpu="cpu,h200", compare=False, cache=cache)
    package = rc.build(source, gpu="cpu,h200", compare=False, cache=cache, allow_partial=True)
    assert [(str(refused.target), refused.backend) for refused in package.manifest.refused_targets] == [("h200", "tensorrt")]
    with rc.load(package.path) as engine:
        assert engine(x=np.ones((1, tiny_models.WIDTH), np.float32)).shape == (1, tiny_models.WIDTH)


def test_a_refusal_is_not_cached(source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise BackendError("the build took longer than its 1 s")

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "build", fail)
        package = rc.build(source, gpu="sm89", compare=False, cache=cache, allow_partial=True)
        assert [refused.reason for refused in package.manifest.refused_targets] == ["the build took longer than its 1 s"]
    package = rc.build(source, gpu="sm89", compare=False, cache=cache)
    assert package.manifest.refused_targets == ()


def test_the_refusal_for_an_unsupported_op_names_the_op(tmp_path: Path, cache: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    odd (float[4] x) => (int64[one, n] y) { [locate] y = NonZero (x) }
    """
    path = tmp_path / "odd.onnx"
    path.write_bytes(onnx.parser.parse_model(text).SerializeToString())
    package = rc.build(path, gpu="cpu,sm86,sm89", compare=False, cache=cache, allow_partial=True)
    assert [str(refused.target) for refused in package.manifest.refused_targets] == ["sm86", "sm89"]
    assert all("NonZero" in refused.reason for refused in package.manifest.refused_targets)


def test_a_graph_that_every_backend_refuses_is_named_by_its_path_in_the_package(tmp_path: Path, cache: Path) -> None:
    text = '<ir_version: 10, opset_import: ["" : 21, "any" : 1]> odd (float[4] x) => (float[4] y) { [odd] y = any.Thing (x) }'
    path = tmp_path / "odd.onnx"
    path.write_bytes(onnx.parser.parse_model(text).SerializeToString())
    package = rc.build(path, gpu="cpu,sm89", cache=cache, allow_partial=True)
    assert [str(refused.target) for refused in package.manifest.refused_targets] == ["sm89", "cpu"]
    cpu_reason = package.manifest.refused_targets[1].reason
    assert cpu_reason == "ONNX Runtime refuses `graphs/model.fold.onnx`: any:Thing(-1) is not a registered function/op"
    reasons = [variant.not_compared_reason for graph in package.manifest.graphs for variant in graph.variants]
    assert all(reason and str(tmp_path / ".") not in reason and ".part" not in reason for reason in reasons), reasons


def test_half_precision_that_overflows_does_not_meet_the_criteria(tmp_path: Path, cache: Path) -> None:
    source = tiny_models.write(tmp_path / "hot.onnx", scale=1e6)
    with pytest.raises(AccuracyError, match=r"graphs/model.fold\+precision"):
        rc.build(source, gpu="sm89", passes="fold,precision{to=fp16,force=[scaled,relu,second,first]}", cache=cache)
    (graph,) = read_package(source.with_suffix(".ryzen")).manifest.graphs
    met = {variant.precision: variant.accuracy[0].met for variant in graph.variants}
    assert met == {"fp16": False, "fp32": True}


def test_nodes_with_measured_overflow_stay_in_fp32(tmp_path: Path, cache: Path) -> None:
    source = tiny_models.write(tmp_path / "hot.onnx", scale=1e6)
    package = rc.build(source, gpu="sm89", precision="fp16", cache=cache)
    variant = next(variant for variant in package.manifest.graphs[0].variants if variant.precision == "fp16")
    assert variant.accuracy[0].met
    assert any("scaled" in note or "second" in note for record in variant.passes for note in record.notes)


def test_a_model_in_half_precision_is_converted_to_fp32_for_the_cpu(tmp_path: Path, cache: Path) -> None:
    package = rc.build(tiny_models.write(tmp_path / "half.onnx", half=True), gpu="cpu", compare=False, cache=cache)
    (variant,) = package.manifest.graphs[0].variants
    assert variant.precision == "fp32"
    assert [record.pass_spec for record in variant.passes][-1] == "precision{to=fp32}"
    with rc.load(package.path) as engine:
        assert engine(x=np.ones((2, tiny_models.WIDTH), np.float16)).dtype == np.float16, "inputs and outputs keep their types"


def test_several_graphs_share_one_package_and_its_weights(tmp_path: Path, cache: Path) -> None:
    files = {"prefill": tiny_models.write(tmp_path / "p.onnx"), "decode": tiny_models.write(tmp_path / "d.onnx")}
    package = rc.build(files, tmp_path / "both.ryzen", gpu="cpu", compare=False, cache=cache)
    assert [graph.name for graph in package.manifest.graphs] == ["prefill", "decode"]
    with pytest.raises(UsageError, match="several graphs"):
        rc.load(package.path)
    with rc.load(package.path, graph="decode") as engine:
        assert engine(x=np.ones((1, tiny_models.WIDTH), np.float32)).shape == (1, tiny_models.WIDTH)


@pytest.mark.parametrize(
    ("config_fields", "message"),
    [
        ({"gpu": "sm88"}, "unknown compute capability 88"),
        ({"backend": "tensorflow"}, "no backend `tensorflow`"),
        ({"passes": "fodl"}, "no pass `fodl`"),
        ({"opt_shapes": ["z:1"]}, "no input `z`"),
        ({"gpu": "sm89", "options": {"builderOptimizationLevel": "9"}}, "builderOptimizationLevel"),
        ({"data": "samples.txt"}, "names no samples"),
        ({"criteria": "missing.toml"}, "missing.toml"),
    ],
)
def test_an_invalid_configuration_writes_nothing(
    source: Path, cache: Path, config_fields: dict[str, object], message: str
) -> None:
    with pytest.raises(rc.RyzenError, match=message):
        rc.build(source, cache=cache, **config_fields)  # type: ignore[arg-type]
    assert sorted(path.name for path in source.parent.iterdir() if path.name != "cache") == ["small.onnx"]


@pytest.mark.parametrize("name", ["with space", "ünïcode 模型", "new\nline"])
def test_file_names_may_contain_any_characters(tmp_path: Path, cache: Path, name: str) -> None:
    source = tiny_models.write(tmp_path / f"{name}.onnx")
    package = rc.build(source, gpu="cpu,sm89", cache=cache)
    assert package.path.name == f"{name}.ryzen"
    with rc.load(package.path) as engine:
        assert engine(x=np.ones((1, tiny_models.WIDTH), np.float32)).shape == (1, tiny_models.WIDTH)


def test_without_a_cache_no_cache_folder_is_written(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RYZEN_COMPILE_CACHE", str(tmp_path / "unused"))
    rc.build(source, gpu="cpu", compare=False, cache=False)
    assert not (tmp_path / "unused").exists()


def test_a_variant_of_a_half_precision_model_records_its_precision(tmp_path: Path, cache: Path) -> None:
    text = '<ir_version: 10, opset_import: ["" : 21]> half (float16[N, 4] x) => (float16[N, 4] y) { y = Relu (x) }'
    path = tmp_path / "half.onnx"
    path.write_bytes(onnx.parser.parse_model(text).SerializeToString())
    package = rc.build(path, gpu="cpu,sm89", cache=cache)
    precisions = {variant.name: (variant.precision, variant.portable) for variant in package.manifest.graphs[0].variants}
    assert precisions == {"fold+attention": ("fp16", False), "fold+precision.to-fp32": ("fp32", True)}


def test_node_names_are_part_of_the_key_if_a_pass_selects_nodes_by_name(tmp_path: Path, cache: Path) -> None:
    def first_inputs(first: str, second: str) -> dict[str, str]:
        text = f"""
        <ir_version: 10, opset_import: ["" : 21]>
        two (float[N, 4] x, float[4, 4] w) => (float[N, 4] y) {{ [{first}] h = MatMul (x, w)  [{second}] y = MatMul (h, w) }}
        """
        path = tmp_path / f"{first}.onnx"
        path.write_bytes(onnx.parser.parse_model(text).SerializeToString())
        passes = "precision{to=fp16,keep=[foo]}"
        package = rc.build(path, gpu="sm89", passes=passes, compare=False, cache=cache)
        (variant,) = [variant for variant in package.manifest.graphs[0].variants if variant.precision == "fp16"]
        return {node.name: node.input[0] for node in onnx.load(package.path / variant.path).graph.node}

    assert first_inputs("foo", "bar")["foo"] == "x"
    assert first_inputs("bar", "foo")["bar"] != "x"


def test_a_model_that_changes_during_a_build_is_refused_and_not_cached(source: Path, cache: Path, tmp_path: Path) -> None:
    rc.build(source, gpu="cpu", compare=False, cache=cache, passes="none")
    before = source.read_bytes()

    class ModelChangingProgress(SilentProgress):
        def report(self, diagnostic: Diagnostic) -> None:
            tiny_models.write(source, seed=5)

    with pytest.raises(ModelError, match="changed since the model was loaded"):
        rc.build(source, tmp_path / "two.ryzen", gpu="cpu", compare=False, cache=cache, progress=ModelChangingProgress())
    assert not (tmp_path / "two.ryzen").exists()
    source.write_bytes(before)
    package = rc.build(source, tmp_path / "two.ryzen", gpu="cpu", compare=False, cache=cache)
    x = np.random.default_rng(1).standard_normal((5, tiny_models.WIDTH)).astype(np.float32)
    with rc.load(package.path) as engine:
        np.testing.assert_allclose(engine(x=x), tiny_models.expected(x), rtol=1e-5, atol=1e-5)


def test_graphs_of_equal_content_share_cached_engines_under_other_names(tmp_path: Path, cache: Path) -> None:
    first_model, second_model = (
        tiny_models.write(tmp_path / "one.onnx", seed=1),
        tiny_models.write(tmp_path / "other.onnx", seed=2),
    )
    rc.build({"a": first_model, "b": first_model}, tmp_path / "same.ryzen", gpu="sm89", compare=False, cache=cache).check()
    first = rc.build({"a": first_model, "b": second_model}, tmp_path / "first.ryzen", gpu="sm89", compare=False, cache=cache)
    second = rc.build({"b": first_model, "a": second_model}, tmp_path / "second.ryzen", gpu="sm89", compare=False, cache=cache)
    second.check()
    engines = [
        {engine.graph: package.file(engine.path).sha256 for engine in package.manifest.engines} for package in (first, second)
    ]
    assert engines[0] == {"a": engines[1]["b"], "b": engines[1]["a"]}


def test_a_failure_during_an_engine_build_ends_the_build(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.setattr(engine_builder, "start_worker", lambda backend: Worker(FaultyBackend("HangingBuilder")))

    def fail(*_: object, **__: object) -> None:
        time.sleep(1.0)
        raise ZeroDivisionError

    monkeypatch.setattr("ryzen_compile.builder.build.run_isolated", fail)
    started = time.perf_counter()
    with pytest.raises(ZeroDivisionError):
        rc.build(source, gpu="sm86,sm89,sm120", cache=False)
    assert time.perf_counter() - started < 20, "each part of the targets was retried, and each retry hung"


def test_onnx_runtime_builds_for_the_cpu_if_it_does_not_support_the_gpu(source: Path, cache: Path) -> None:
    package = rc.build(source, gpu="cpu,sm89", backend="onnxruntime", compare=False, cache=cache, allow_partial=True)
    assert [str(refused.target) for refused in package.manifest.refused_targets] == ["sm89"]
    with rc.load(package.path) as engine:
        assert engine(x=np.ones((1, tiny_models.WIDTH), np.float32)).shape == (1, tiny_models.WIDTH)


def test_a_rejected_package_does_not_replace_a_valid_one(source: Path, cache: Path, tmp_path: Path) -> None:
    valid = rc.build(source, tmp_path / "m.ryzen", gpu="cpu", compare=False, cache=cache)
    with pytest.raises(BackendError, match="m.rejected.ryzen: the package was written"):
        rc.build(source, tmp_path / "m.ryzen", gpu="cpu,h200", compare=False, cache=cache)
    assert read_package(tmp_path / "m.ryzen").manifest == valid.manifest
    rejected = read_package(tmp_path / "m.rejected.ryzen")
    assert rejected.manifest.name == "m.rejected"
    assert [str(refused.target) for refused in rejected.manifest.refused_targets] == ["h200"]


def test_a_failed_comparison_is_reported_and_not_cached(source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise BackendError("no runtime")

    monkeypatch.setattr("ryzen_compile.builder.build.run_isolated", fail)
    with pytest.raises(BackendError, match="could not be compared: no runtime"):
        rc.build(source, gpu="cpu", cache=cache)
    monkeypatch.undo()
    assert rc.build(source, gpu="cpu", cache=cache).manifest.graphs[0].variants[0].accuracy[0].met


def test_samples_of_a_script_are_part_of_the_key_by_value(source: Path, cache: Path, tmp_path: Path) -> None:
    script = tmp_path / "loader.py"
    script.write_text(
        "import numpy as np\nfrom pathlib import Path\n"
        "def load_data():\n    yield {'x': np.load(Path(__file__).with_name('x.npy'))}\n"
    )
    keys = []
    for seed in (1, 1, 2):
        np.save(tmp_path / "x.npy", np.random.default_rng(seed).standard_normal((2, tiny_models.WIDTH)).astype(np.float32))
        keys.append(rc.build(source, gpu="cpu", cache=cache, data=str(script)).manifest.key)
    assert keys[0] == keys[1] != keys[2]


def test_a_package_from_the_cache_names_the_requested_source_file(source: Path, cache: Path, tmp_path: Path) -> None:
    rc.build(source, tmp_path / "one.ryzen", gpu="cpu", cache=cache)
    renamed = source.rename(tmp_path / "renamed.onnx")
    (graph,) = rc.build(renamed, tmp_path / "two.ryzen", gpu="cpu", cache=cache).manifest.graphs
    assert graph.source_file == "renamed.onnx"
    assert graph.variants[0].accuracy[0].baseline.startswith("renamed.onnx, ")


def test_a_pass_that_is_left_out_is_reported_by_every_build(source: Path, cache: Path) -> None:
    for _ in range(2):
        progress = RecordingProgress()
        rc.build(source, gpu="cpu", precision="fp16", compare=False, cache=cache, progress=progress)
        assert "model: `precision{to=fp16}` is left out: the portable variant never uses half precision" in progress.lines


@pytest.mark.parametrize(
    ("declared", "body", "value"),
    [
        ("seq(float[2]) s", "c = ConcatFromSequence <axis = 0> (s)  y = Add (c, x)", [np.zeros(2, np.float32)] * 2),
        ("float[rank] s", "y = Add (s, x)", np.ones((2, 2), np.float32)),
    ],
    ids=["sequence", "unknown-rank"],
)
def test_a_model_with_an_input_without_a_shape_is_built(declared: str, body: str, value: Any, tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 21]> g ({declared}, float[1] x) => (float[n] y) {{ {body} }}'
    )
    if model.graph.input[0].type.HasField("tensor_type"):
        model.graph.input[0].type.tensor_type.ClearField("shape")
    onnx.save(model, tmp_path / "g.onnx")
    package = rc.build(tmp_path / "g.onnx", gpu="cpu", compare=False, cache=False)
    with rc.load(package.path) as engine:
        assert engine.run(s=value, x=np.ones(1, np.float32))["y"].size == 4
