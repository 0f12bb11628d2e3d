"""The choice of the engine: it must fit the GPU that executes it, and the summary states the rule."""

from __future__ import annotations

from types import SimpleNamespace

import msgspec
import pytest

from ryzen_compile import registry
from ryzen_compile.artifacts.package.manifest import EngineRecord, Manifest
from ryzen_compile.artifacts.package.read import Package
from ryzen_compile.backends.cuda_device import current_device
from ryzen_compile.errors import PackageError
from ryzen_compile.runtime.choose import choose
from ryzen_compile.runtime.choose import incompatibility as incompatibility_with
from ryzen_compile.spec.target import Gpu, parse_target

L4 = Gpu(name="NVIDIA L4", sm=89, memory_bytes=24 * 10**9, driver="580.1")
A10 = Gpu(name="NVIDIA A10", sm=86, memory_bytes=24 * 10**9, driver="580.1")


@pytest.fixture
def engine(package: Package, monkeypatch: pytest.MonkeyPatch) -> EngineRecord:
    """The engine for sm89 of the package, with a backend that can run it."""
    rtx = registry.find_backend("tensorrt-rtx")
    capabilities = msgspec.structs.replace(rtx.probe(), can_run=True)
    monkeypatch.setattr(type(rtx), "probe", lambda self: capabilities)
    (record,) = package.manifest.engines
    return record


def use_gpus(monkeypatch: pytest.MonkeyPatch, *gpus: Gpu, current: Gpu | None = None) -> None:
    """Simulate a machine with `gpus`; `current` is the current CUDA device, None if CUDA cannot be queried."""

    def device() -> SimpleNamespace:
        if current is None:
            raise RuntimeError("no CUDA driver")
        return SimpleNamespace(name=current.name, arch=str(current.sm))

    monkeypatch.setattr("ryzen_compile.runtime.choose.detect_gpus", lambda: gpus)
    monkeypatch.setattr("cuda.core.Device", device)


def engine_for(engine: EngineRecord, target: str, **changes: str) -> EngineRecord:
    return msgspec.structs.replace(engine, path=f"engines/{target}.plan", targets=(parse_target(target),), **changes)


def incompatibility(engine: EngineRecord, gpus: tuple[Gpu, ...]) -> str | None:
    return incompatibility_with(engine, gpus, current_device(gpus))


def with_engines(manifest: Manifest, *engines: EngineRecord) -> Manifest:
    return msgspec.structs.replace(manifest, engines=engines)


@pytest.mark.parametrize("current", [L4, None])
def test_an_engine_for_the_gpu_of_this_machine_is_preferred(
    current: Gpu | None, package: Package, engine: EngineRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_gpus(monkeypatch, L4, current=current)
    assert incompatibility(engine, (L4,)) is None
    _, choice = choose(package.manifest, None, None, None)
    assert (choice.backend, choice.path, choice.gpu) == ("tensorrt-rtx", engine.path, "NVIDIA L4")
    assert choice.files == (engine.path,)
    assert choice.summary == f"{engine.path} by tensorrt-rtx, built for sm89, on NVIDIA L4"


def test_an_engine_that_cannot_run_is_rejected_with_the_reason(engine: EngineRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    use_gpus(monkeypatch, L4, current=L4)
    assert incompatibility(engine, ()) == "the engine needs sm89, and no NVIDIA driver was found"
    older = msgspec.structs.replace(engine, backend_version="1.2.0.1")
    assert "the engine needs tensorrt-rtx 1.2.0.1, and this machine has" in str(incompatibility(older, (L4,)))
    use_gpus(monkeypatch, A10, current=A10)
    assert incompatibility(engine, (A10,)) == "the engine needs sm89, and the current GPU is NVIDIA A10 (sm86)"


@pytest.mark.parametrize("current", [L4, A10])
def test_of_several_gpus_the_engine_for_the_current_device_is_chosen(
    current: Gpu, package: Package, engine: EngineRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_gpus(monkeypatch, A10, L4, current=current)
    manifest = with_engines(package.manifest, engine_for(engine, "sm86"), engine_for(engine, "sm89"))
    _, choice = choose(manifest, None, None, None)
    other = A10 if current is L4 else L4
    assert choice.path == f"engines/sm{current.sm}.plan"
    assert choice.gpu == current.name
    assert choice.summary.endswith(f", built for sm{current.sm}, on {current.name}")
    assert choice.not_chosen == (
        f"engines/sm{other.sm}.plan: the engine needs sm{other.sm}, and the current GPU is {current.name} (sm{current.sm}); "
        "set CUDA_VISIBLE_DEVICES to use another GPU of this machine",
    )


def test_an_engine_for_a_gpu_that_is_not_the_current_device_is_not_chosen(
    package: Package, engine: EngineRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_gpus(monkeypatch, A10, L4, current=A10)
    _, choice = choose(package.manifest, None, None, None)
    assert choice.backend == "onnxruntime"
    assert choice.gpu is None
    assert "the current GPU is NVIDIA A10 (sm86)" in choice.summary


@pytest.mark.parametrize("visible", ["", "-1", "-1,0"])
def test_no_engine_is_chosen_if_every_gpu_is_hidden(
    visible: str, package: Package, engine: EngineRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_gpus(monkeypatch, L4)  # CUDA reports no device, as the real one does
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert incompatibility(engine, (L4,)) == "the engine needs sm89, and CUDA_VISIBLE_DEVICES hides every GPU from this process"
    assert choose(package.manifest, None, None, None)[1].backend == "onnxruntime"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert incompatibility(engine, (L4,)) is None


def test_the_version_does_not_affect_the_order_of_engines_that_fit(
    package: Package, engine: EngineRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_gpus(monkeypatch, L4, current=L4)
    older = msgspec.structs.replace(engine, path="engines/older.plan")
    newer = msgspec.structs.replace(engine, path="engines/newer.plan", backend_version=f"{engine.backend_version}.9")
    for first, second in ((older, newer), (newer, older)):
        _, choice = choose(with_engines(package.manifest, first, second), None, None, None)
        assert choice.path == first.path
        assert choice.summary == f"{first.path} by tensorrt-rtx, the first of 2 engines built for sm89, on NVIDIA L4"
        assert choice.not_chosen == (f"{second.path}: it can run here, but `{first.path}` comes first in the package",)


def with_half_precision(manifest: Manifest, engine: EngineRecord) -> Manifest:
    """Return `manifest` with a second variant in half precision for the backend of `engine`, and its engine."""
    (graph,) = manifest.graphs
    second = msgspec.structs.replace(manifest.variant_of(engine), name="fold+half", path="graphs/half.onnx", precision="fp16")
    half = msgspec.structs.replace(engine, path="engines/half.plan", variant="fold+half")
    graph = msgspec.structs.replace(graph, variants=(*graph.variants, second))
    return msgspec.structs.replace(manifest, graphs=(graph,), engines=(half, engine))


def test_the_first_variant_of_the_backend_is_chosen_unless_another_is_named(
    package: Package, engine: EngineRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_gpus(monkeypatch, L4, current=L4)
    manifest = with_half_precision(package.manifest, engine)
    _, choice = choose(manifest, None, None, None)
    assert (choice.path, choice.variant) == (engine.path, engine.variant)
    assert f", variant {engine.variant}, the default of 2, built for sm89" in choice.summary
    assert choice.not_chosen == ("engines/half.plan: its variant is not the default; it is loaded by name",)
    _, choice = choose(manifest, None, "fold+half", None)
    assert (choice.path, choice.variant) == ("engines/half.plan", "fold+half")
    assert ", variant fold+half as named, built for sm89" in choice.summary
    assert choice.not_chosen == (f"{engine.path}: it is of another variant than `fold+half`",)


def test_a_named_variant_that_cannot_run_here_is_not_replaced_by_another(package: Package, engine: EngineRecord) -> None:
    manifest = with_half_precision(package.manifest, engine)
    with pytest.raises(PackageError, match=r"variant `fold\+half` of `model`.*no NVIDIA driver was found") as caught:
        choose(manifest, None, "fold+half", None)
    (portable,) = (variant for variant in manifest.graphs[0].variants if variant.portable)
    assert f"load `{portable.name}`, its portable variant" in str(caught.value.hint)
