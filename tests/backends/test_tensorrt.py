"""The backend `tensorrt`, as far as it differs from `tensorrt-rtx`, on mocks: its libraries are not installed.

`test_nvidia_bindings.py` verifies that every attribute used exists in the real bindings.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import call, create_autospec

import pytest
import tensorrt_rtx_bindings as trt
from support import backend_graphs
from support.fake_gpu import FAKE_GPU

from ryzen_compile import registry
from ryzen_compile.backends.api import AttentionFusion, BuildRequest
from ryzen_compile.backends.cuda_device import current_device_sm
from ryzen_compile.backends.nvinfer.builder_log import BuilderLog
from ryzen_compile.backends.tensorrt.backend import BACKEND
from ryzen_compile.backends.tensorrt.builder import TensorRTBuilder
from ryzen_compile.errors import BackendError
from ryzen_compile.kernels.specialization import PTX_VERSIONS
from ryzen_compile.spec.target import ARCHITECTURES, Gpu


@pytest.fixture
def builder() -> TensorRTBuilder:
    builder = object.__new__(TensorRTBuilder)
    builder.trt = trt
    return builder


@pytest.fixture
def config() -> object:
    return create_autospec(trt.IBuilderConfig, instance=True, spec_set=True)


def request_with_timing_cache(folder: Path) -> BuildRequest:
    return backend_graphs.build_request("m.onnx", folder / "m.plan", options={"timingCacheFile": str(folder / "timing.cache")})


def test_a_timing_cache_is_read_and_written_back(builder: TensorRTBuilder, config: object, tmp_path: Path) -> None:
    config.get_timing_cache.return_value.serialize.return_value = b"measured"  # type: ignore[attr-defined]
    for saved in (b"", b"measured"):
        builder.configure_targets(config, request_with_timing_cache(tmp_path))
        builder.after_build(config, request_with_timing_cache(tmp_path))
        config.create_timing_cache.assert_called_with(saved)  # type: ignore[attr-defined]
        assert (tmp_path / "timing.cache").read_bytes() == b"measured"


def test_a_timing_cache_of_another_gpu_is_rejected(builder: TensorRTBuilder, config: object, tmp_path: Path) -> None:
    config.set_timing_cache.return_value = False  # type: ignore[attr-defined]
    with pytest.raises(BackendError, match="is the timing cache of another GPU or TensorRT version"):
        builder.configure_targets(config, request_with_timing_cache(tmp_path))


def test_without_the_option_there_is_no_timing_cache(builder: TensorRTBuilder, config: object, tmp_path: Path) -> None:
    request = backend_graphs.build_request("m.onnx", tmp_path / "m.plan")
    builder.configure_targets(config, request)
    builder.after_build(config, request)
    preview_feature = call.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    assert config.mock_calls == [preview_feature]  # type: ignore[attr-defined]


def test_the_engine_inspector_reports_the_layers_if_a_gpu_of_the_target_is_present(
    builder: TensorRTBuilder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    layer = {"Name": "_gemm_mha_v2", "LayerType": "kgen", "Outputs": [{"Datatype": "Half"}], "Metadata": "[ONNX Layer: a]"}
    inspector = SimpleNamespace(get_engine_information=lambda form: json.dumps({"Layers": [layer]}))
    engine = SimpleNamespace(create_engine_inspector=lambda: inspector)
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda plan: engine)
    builder.trt = SimpleNamespace(**{**vars(trt), "Runtime": lambda logger: runtime})
    request, log = backend_graphs.build_request("m.onnx", tmp_path / "m.plan"), BuilderLog(trt)
    assert builder._inspect_layers(b"plan", request, log) is None
    monkeypatch.setattr("ryzen_compile.backends.nvinfer.builder.detect_gpus", lambda: (FAKE_GPU,))
    layers = builder._inspect_layers(b"plan", request, log)
    assert layers is not None
    assert layers.source == "engine inspector"
    assert layers.attentions == (AttentionFusion(kernel="_gemm_mha_v2", fused=True, nodes=("a",)),)


def test_it_builds_for_the_gpus_of_this_machine_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("ryzen_compile.backends.tensorrt.backend.detect_gpus", lambda: (FAKE_GPU,))
    monkeypatch.setattr(type(BACKEND), "installed_version", lambda self: "11.4.0")
    assert BACKEND.probe().sms == (89,)
    BACKEND.check(backend_graphs.build_request("m.onnx", tmp_path / "m.plan", gpu="sm89"))
    with pytest.raises(BackendError, match="does not build for `sm90` on this machine") as caught:
        BACKEND.check(backend_graphs.build_request("m.onnx", tmp_path / "m.plan", gpu="sm90"))
    assert caught.value.hint == "builds for the GPUs of this machine: sm89"


def test_without_a_gpu_it_is_installed_and_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(BACKEND), "installed_version", lambda self: "11.4.0")
    capabilities = BACKEND.probe()
    assert not capabilities.available
    assert capabilities.version == "11.4.0"
    assert "no GPU was found" in capabilities.message


def make_gpus(*sms: int) -> tuple[Gpu, ...]:
    return tuple(Gpu(name="fake GPU", sm=sm, memory_bytes=1 << 34, driver="580") for sm in sms)


def test_kernels_are_compiled_for_the_current_device_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The current device is neither the GPU with the lowest compute capability nor the first one that NVML lists."""
    monkeypatch.setattr("ryzen_compile.backends.cuda_device.detect_gpus", lambda: make_gpus(120, 86, 89))
    monkeypatch.setattr("cuda.core.Device", lambda: SimpleNamespace(name="fake GPU", arch="89"))
    assert current_device_sm() == 89


@pytest.mark.parametrize(("sms", "sm"), [((120, 86, 89), 86), ((90,), 90), ((), None)])
def test_kernels_are_compiled_for_the_oldest_gpu_if_cuda_cannot_be_queried(
    sms: tuple[int, ...], sm: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("no driver")

    monkeypatch.setattr("ryzen_compile.backends.cuda_device.detect_gpus", lambda: make_gpus(*sms))
    for device in (fail, None):
        monkeypatch.setattr("cuda.core.Device", device)
        assert current_device_sm() == sm


@pytest.fixture
def registered(builder: TensorRTBuilder, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Record (op name, compute capability) of each registered op in the returned list."""
    calls: list[tuple[str, int]] = []
    monkeypatch.setattr(
        "ryzen_compile.backends.tensorrt.builder.register_plugin", lambda op, *rest, sm, store: calls.append((op.name, sm))
    )
    monkeypatch.setitem(sys.modules, "fake_tensorrt.plugin", ModuleType("fake_tensorrt.plugin"))
    builder.trt = SimpleNamespace(__name__="fake_tensorrt")
    registry.ops()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    return calls


@pytest.mark.parametrize("sm", PTX_VERSIONS)
def test_every_op_with_a_kernel_is_registered(
    sm: int, builder: TensorRTBuilder, registered: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ryzen_compile.backends.tensorrt.builder.current_device_sm", lambda: sm)
    builder.register_op_plugins()
    assert registered == [(op.name, sm) for op in registry.ops().values() if op.kernel is not None]


@pytest.mark.parametrize("sm", [*sorted({*ARCHITECTURES} - {*PTX_VERSIONS}), None])
def test_no_op_is_registered_for_a_gpu_that_kernels_are_not_compiled_for(
    sm: int | None, builder: TensorRTBuilder, registered: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ryzen_compile.backends.tensorrt.builder.current_device_sm", lambda: sm)
    builder.register_op_plugins()
    assert registered == []


@pytest.mark.parametrize("missing", ["triton", "tensorrt"])
def test_no_op_is_registered_without_the_packages_that_plugins_need(
    missing: str, builder: TensorRTBuilder, registered: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ryzen_compile.backends.tensorrt.builder.current_device_sm", lambda: 90)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else object())
    builder.register_op_plugins()
    assert registered == []
